// Rates of tensor-core and integer instructions, and bandwidths, of the GPU that it runs on: a line
// of JSON about the device, then one for each figure.
//
// A rate is measured where nothing but the instruction can limit it: operands are random and stay
// in registers (or in shared memory, where the instruction reads it, or where a load for every two
// products shows whether loads issue beside them), and each warp has independent accumulators. All
// sums of tensor cores are compared with sums made on the host, so what is counted has run. One
// that differs is reported, marked, and makes the exit code 1.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "rate_kernels.cuh"

#define CHECK(call)                                                                             \
  do {                                                                                          \
    const cudaError_t error = (call);                                                           \
    if (error != cudaSuccess) {                                                                 \
      std::fprintf(stderr, "rates.cu:%d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                             \
    }                                                                                           \
  } while (false)

constexpr int kCheckedSteps = 64;
constexpr int kSamples = 7;
constexpr float kSampleMilliseconds = 3;

// What a word of A times a word of B adds to a product.
double word_product(Type a_type, Type b_type, uint32_t a, uint32_t b) {
  const auto element = [](Type type, uint32_t word, int i) -> double {
    const auto half_word = static_cast<uint16_t>(word >> (16 * (i & 1)));
    switch (type) {
      case Type::kBit: return word >> i & 1;
      case Type::kS8: return static_cast<int8_t>(word >> (8 * i));
      case Type::kU8: return static_cast<uint8_t>(word >> (8 * i));
      case Type::kS4: return static_cast<int32_t>(word << (28 - 4 * i)) >> 28;
      case Type::kBf16: return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{half_word}));
      case Type::kF16: return __half2float(__half(__half_raw{half_word}));
    }
    return NAN;
  };
  if (a_type == Type::kBit) return __builtin_popcount(a & b);
  const int elements = is_float(a_type) ? 2 : a_type == Type::kS4 ? 8 : 4;
  double sum = 0;
  for (int i = 0; i < elements; ++i) sum += element(a_type, a, i) * element(b_type, b, i);
  return sum;
}

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15;
  uint32_t next() {  // xorshift64*
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return static_cast<uint32_t>(state * 0x2545f4914f6cdd1d >> 32);
  }
};

// Random words: all bits, or two floats of either sign from 0.5 to 2.
std::vector<uint32_t> random_words(Type type, size_t count, Random& random) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) {
    word = random.next();
    if (type == Type::kBf16) word = (word & 0x80ff80ff) | 0x3f003f00;
    if (type == Type::kF16) word = (word & 0x87ff87ff) | 0x38003800;
  }
  return words;
}

template <typename T>
T* to_device(const std::vector<T>& values) {
  T* device;
  CHECK(cudaMalloc(&device, values.size() * sizeof(T)));
  CHECK(cudaMemcpy(device, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double milliseconds(const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaEventRecord(begin));
  launch();
  CHECK(cudaGetLastError());
  CHECK(cudaEventRecord(end));
  CHECK(cudaEventSynchronize(end));
  float elapsed;
  CHECK(cudaEventElapsedTime(&elapsed, begin, end));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return elapsed;
}

// Steps that take about kSampleMilliseconds, given a launch of so many steps.
int steps_for_a_sample(const std::function<void(int)>& launch) {
  int steps = kCheckedSteps;
  launch(steps);  // the first loads the kernel
  double elapsed = milliseconds([&] { launch(steps); });
  while (elapsed < kSampleMilliseconds / 4) {
    steps *= 4;
    elapsed = milliseconds([&] { launch(steps); });
  }
  return std::max(1, static_cast<int>(steps * kSampleMilliseconds / elapsed));
}

struct Device {
  cudaDeviceProp properties;
  int arch;
  uint32_t* sums;     // one for each thread of a grid
  long long* cycles;  // one for each block
  bool all_right = true;

  int sms() const { return properties.multiProcessorCount; }
};

// Whether each block has summed up to `expected`, exactly if they are integers.
bool check_sums(Device& device, const char* name, Type type, int threads, double expected,
                double error) {
  std::vector<uint32_t> sums(device.sms() * threads);
  CHECK(cudaMemcpy(sums.data(), device.sums, 4 * sums.size(), cudaMemcpyDeviceToHost));
  for (int block = 0; block < device.sms(); ++block) {
    uint32_t sum = 0;
    double float_sum = 0;
    for (int i = 0; i < threads; ++i) {
      float value;
      memcpy(&value, &sums[block * threads + i], sizeof value);
      sum += sums[block * threads + i];
      float_sum += value;
    }
    const auto wanted = static_cast<uint32_t>(static_cast<int64_t>(expected));
    const bool right =
        is_float(type) ? std::abs(float_sum - expected) <= error : sum == wanted;
    if (!right) {
      std::fprintf(stderr, "%s: block %d has the sum %.9g, not %.9g\n", name, block,
                   is_float(type) ? float_sum : static_cast<double>(sum),
                   is_float(type) ? expected : static_cast<double>(wanted));
      return device.all_right = false;
    }
  }
  return true;
}

// Times `launch(steps)`, of one block an SM with `operations` a step in a block, and prints a row.
void report_rate(Device& device, const char* name, const char* unit, const char* operands,
                 int warps, bool right, double operations,
                 const std::function<void(int)>& launch) {
  const int steps = steps_for_a_sample(launch);
  std::vector<double> times, clocks;
  std::vector<long long> cycles(device.sms());
  for (int sample = 0; sample < kSamples; ++sample) {
    times.push_back(milliseconds([&] { launch(steps); }));
    CHECK(cudaMemcpy(cycles.data(), device.cycles, 8 * cycles.size(), cudaMemcpyDeviceToHost));
    clocks.push_back(*std::max_element(cycles.begin(), cycles.end()));
  }
  const double ms = median(times), clock = median(clocks), done = operations * steps;
  std::printf(
      "{\"instruction\": \"%s\", \"unit\": \"%s\", \"operands\": \"%s\", \"warps_per_sm\": %d, "
      "\"right\": %s, \"milliseconds\": %.4f, \"tops\": %.3f, \"ops_per_clock_per_sm\": %.2f, "
      "\"sm_mhz\": %.0f}\n",
      name, unit, operands, warps, right ? "true" : "false", ms, done * device.sms() / ms / 1e9,
      done / clock, clock / ms / 1e3);
}

template <Type kA, Type kB, bool kFromShared>
void measure_mma(Device& device, const char* name, const char* unit, int k) {
  Random random;
  const auto a = random_words(kA, kRowFragments * 4 * kWarp, random);
  const auto b = random_words(kB, kAccumulators * 2 * kWarp, random);
  // Lane l holds rows l / 4 and l / 4 + 8 of A and column l / 4 of B, at words l % 4 and l % 4 + 4
  // along K. So words of A meet those of B in lanes alike modulo 4.
  double expected = 0, size = 0;
  for (int i = 0; i < kAccumulators; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int other = lane % 4; other < kWarp; other += 4) {
          const uint32_t word = a[(4 * (i % kRowFragments) + j) * kWarp + lane];
          const double product =
              word_product(kA, kB, word, b[4 * (i / 2 * kWarp + other) + 2 * (i % 2) + j / 2]);
          expected += product, size += std::abs(product);
        }
      }
    }
  }
  uint32_t* const rows = to_device(a);
  auto* const columns = reinterpret_cast<uint4*>(to_device(b));
  for (const int warps : {4, 8, 16}) {
    const auto launch = [&](int steps) {
      mma_kernel<kA, kB, kFromShared><<<device.sms(), warps * kWarp>>>(
          rows, columns, steps, device.sums, device.cycles);
    };
    launch(kCheckedSteps);
    CHECK(cudaGetLastError());
    // A float sum is cut once for each element along K at most, to 23 bits. No sum of magnitudes
    // that are part of it is larger than that of all words.
    const double error = kCheckedSteps * k * std::ldexp(kCheckedSteps * size, -23);
    const bool right = check_sums(device, name, kA, warps * kWarp, warps * kCheckedSteps * expected,
                                  warps * error);
    report_rate(device, name, unit, kFromShared ? "B by LDS.128 for two" : "registers", warps,
                right, 2.0 * 16 * 8 * k * kAccumulators * warps, launch);
  }
  CHECK(cudaFree(rows));
  CHECK(cudaFree(columns));
}

template <Type kA, Type kB>
void measure_wgmma(Device& device, const char* name, const char* unit, int k) {
  Random random;
  constexpr int kWords = kRowBytes / 4;
  const auto a = random_words(kA, kGroupRows * kWords, random);
  const auto b = random_words(kB, kGroupColumns * kWords, random);
  // The swizzle keeps 16 bytes together and moves them to place chunk ^ (row % 8) of their row.
  const auto at = [](const std::vector<uint32_t>& tile, int row, int word) {
    return tile[row * kWords + (word ^ row % 8 * 4)];
  };
  double expected = 0, size = 0;
  for (int word = 0; word < kWords; ++word) {
    for (int row = 0; row < kGroupRows; ++row) {
      for (int column = 0; column < kGroupColumns; ++column) {
        const double product = word_product(kA, kB, at(a, row, word), at(b, column, word));
        expected += product, size += std::abs(product);
      }
    }
  }
  uint32_t *const rows = to_device(a), *const columns = to_device(b);
  constexpr int kBytes = (kGroupRows + kGroupColumns) * kRowBytes;
  constexpr int kTurns = kGroupSteps / (kRowBytes / 32);  // through all of a row, in a step
  for (const int warps : {4, 8}) {
    const auto launch = [&](int steps) {
      wgmma_kernel<kA, kB><<<device.sms(), warps * kWarp, kBytes>>>(
          rows, columns, steps, device.sums, device.cycles);
    };
    launch(kCheckedSteps);
    CHECK(cudaGetLastError());
    const int groups = warps / 4;
    const double turns = kCheckedSteps * kTurns;
    const double error = turns * 4 * k * std::ldexp(turns * size, -23);
    const bool right = check_sums(device, name, kA, warps * kWarp, groups * turns * expected,
                                  groups * error);
    report_rate(device, name, unit, "shared memory", warps, right,
                2.0 * kGroupRows * kGroupColumns * k * kGroupSteps * groups, launch);
  }
  CHECK(cudaFree(rows));
  CHECK(cudaFree(columns));
}

template <Scalar kScalar>
void measure_scalar(Device& device, const char* name) {
  Random random;
  uint32_t* const words = to_device(random_words(Type::kBit, kChains * kWarp, random));
  constexpr int kWarps = 16;
  report_rate(device, name, "scalar", "registers", kWarps, true, 4.0 * kChains * kWarps * kWarp,
              [&](int steps) {
                scalar_kernel<kScalar><<<device.sms(), kWarps * kWarp>>>(
                    words, steps, device.sums, device.cycles);
              });
  CHECK(cudaFree(words));
}

void report_bandwidth(const char* name, double bytes,
                      const std::function<void()>& launch) {
  launch();
  std::vector<double> times;
  for (int sample = 0; sample < kSamples; ++sample) times.push_back(milliseconds(launch));
  std::printf("{\"path\": \"%s\", \"milliseconds\": %.4f, \"gigabytes_per_second\": %.1f}\n",
              name, median(times), bytes / median(times) / 1e6);
}

void measure_memory(Device& device) {
  constexpr size_t kBytes = size_t{1} << 30;
  char *from, *to;
  CHECK(cudaMalloc(&from, kBytes));
  CHECK(cudaMalloc(&to, kBytes));
  Random random;
  std::vector<uint32_t> block(1 << 20);
  for (uint32_t& word : block) word = random.next();
  for (size_t i = 0; i < kBytes; i += 4 * block.size()) {
    CHECK(cudaMemcpy(from + i, block.data(), 4 * block.size(), cudaMemcpyHostToDevice));
  }
  const auto read = [&](size_t bytes, int passes) {
    read_kernel<<<2 * device.sms(), 512>>>(reinterpret_cast<const uint4*>(from), bytes / 16, passes,
                                           device.sums);
  };
  report_bandwidth("copy, bytes read and written", 2.0 * kBytes, [&] {
    CHECK(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice));
  });
  report_bandwidth("read", kBytes, [&] { read(kBytes, 1); });
  // A quarter of the second level: where it has two halves, both may hold what they are asked for.
  const size_t cached = device.properties.l2CacheSize / 4 / 4096 * 4096;
  constexpr int kPasses = 200;
  report_bandwidth("read, second-level cache", double(kPasses) * cached,
                   [&] { read(cached, kPasses); });
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
}

void measure_tensor_cores(Device& device) {
  if (HAS_BINARY_MMA(device.arch)) {
    constexpr Type kBit = Type::kBit;
    measure_mma<kBit, kBit, false>(device, "mma.sync m16n8k256 b1 and.popc", "b1", 256);
    measure_mma<kBit, kBit, true>(device, "mma.sync m16n8k256 b1 and.popc", "b1", 256);
  }
  if (HAS_INT4_MMA(device.arch)) {
    measure_mma<Type::kS4, Type::kS4, false>(device, "mma.sync m16n8k64 s4", "int4", 64);
  }
  measure_mma<Type::kS8, Type::kS8, false>(device, "mma.sync m16n8k32 s8", "int8", 32);
  measure_mma<Type::kS8, Type::kS8, true>(device, "mma.sync m16n8k32 s8", "int8", 32);
  measure_mma<Type::kU8, Type::kS8, false>(device, "mma.sync m16n8k32 u8 s8", "int8", 32);
  measure_mma<Type::kBf16, Type::kBf16, false>(device, "mma.sync m16n8k16 bf16", "bf16", 16);
  measure_mma<Type::kBf16, Type::kBf16, true>(device, "mma.sync m16n8k16 bf16", "bf16", 16);
  measure_mma<Type::kF16, Type::kF16, false>(device, "mma.sync m16n8k16 f16", "f16", 16);
  if (device.arch == 900) {
    measure_wgmma<Type::kBit, Type::kBit>(device, "wgmma m64n256k256 b1 and.popc", "b1", 256);
    measure_wgmma<Type::kS8, Type::kS8>(device, "wgmma m64n256k32 s8", "int8", 32);
    measure_wgmma<Type::kU8, Type::kS8>(device, "wgmma m64n256k32 u8 s8", "int8", 32);
    measure_wgmma<Type::kBf16, Type::kBf16>(device, "wgmma m64n256k16 bf16", "bf16", 16);
  }
}

void measure_scalars(Device& device) {
  measure_scalar<Scalar::kFfma>(device, "fma.rn.f32");
  measure_scalar<Scalar::kImad>(device, "mad.lo.u32");
  measure_scalar<Scalar::kLop3>(device, "lop3.b32");
  measure_scalar<Scalar::kPopc>(device, "popc.b32");
  measure_scalar<Scalar::kPrmt>(device, "prmt.b32");
  measure_scalar<Scalar::kI2f>(device, "cvt.rn.f32.s32");
}

int main() {
  Device device{};
  CHECK(cudaGetDeviceProperties(&device.properties, 0));
  const cudaDeviceProp& properties = device.properties;
  device.arch = 100 * properties.major + 10 * properties.minor;
  CHECK(cudaMalloc(&device.sums, 4 * 1024 * device.sms()));
  CHECK(cudaMalloc(&device.cycles, 8 * device.sms()));
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was measured stays if something fails
  std::printf("{\"device\": \"%s\", \"compute_capability\": \"%d.%d\", \"sms\": %d, "
              "\"l2_bytes\": %d}\n",
              properties.name, properties.major, properties.minor, device.sms(),
              properties.l2CacheSize);
  measure_memory(device);
  measure_tensor_cores(device);
  measure_scalars(device);
  CHECK(cudaDeviceSynchronize());
  return device.all_right ? 0 : 1;
}

// Products of 8-, 4- and 1-bit integers by CUTLASS, in its default tiles for compute capability
// 8.0, as JSON lines: what the paper compares with.
//
// Arguments are M, N and K, again and again. Operands are random, and there are so many sets of
// them that together they exceed the second-level cache twice. Results are sampled and compared
// with sums made on the host.
#include <cutlass/gemm/device/gemm.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#define CHECK(call)                                                                           \
  do {                                                                                        \
    const cudaError_t error = (call);                                                         \
    if (error != cudaSuccess) {                                                               \
      std::fprintf(stderr, "cutlass.cu:%d: %s\n", __LINE__, cudaGetErrorString(error));       \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (false)

constexpr int kRounds = 5;
constexpr float kSampleMilliseconds = 10;
constexpr int kSampled = 64;

struct Shape {
  int m, n, k;
};

using cutlass::gemm::GemmShape;

// `kDepth` is K of one mma.sync.
template <typename T, typename Operator, int kDepth>
using Gemm = cutlass::gemm::device::Gemm<
    T, cutlass::layout::RowMajor, T, cutlass::layout::ColumnMajor, int32_t,
    cutlass::layout::RowMajor, int32_t, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    GemmShape<128, 256, 2 * kDepth>, GemmShape<64, 64, 2 * kDepth>, GemmShape<16, 8, kDepth>,
    cutlass::epilogue::thread::LinearCombination<int32_t, 4, int32_t, int32_t>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, /*stages=*/3,
    128 / cutlass::sizeof_bits<T>::value, 128 / cutlass::sizeof_bits<T>::value,
    /*split K in one launch=*/false, Operator>;

// Sum over two rows of packed elements of `bits` bits, signed unless it is one.
int32_t dot(const uint8_t* a, const uint8_t* b, int64_t bytes, int bits) {
  const auto element = [bits](uint8_t byte, int i) {
    return static_cast<int8_t>(byte << (8 - bits - bits * i)) >> (8 - bits);
  };
  int32_t sum = 0;
  for (int64_t j = 0; j < bytes; ++j) {
    for (int i = 0; i < 8 / bits; ++i) sum += element(a[j], i) * element(b[j], i);  // -1 * -1 = 1
  }
  return sum;
}

// Sets of operands and a result each, of one shape.
struct Operands {
  std::vector<uint8_t> a, b;  // the same in all sets
  std::vector<uint8_t*> device_a, device_b;
  std::vector<int32_t*> device_c;

  Operands(const Shape& shape, int bits, int64_t cache_bytes) {
    std::mt19937 random(0);
    const auto fill = [&](std::vector<uint8_t>& bytes, int64_t elements) {
      bytes.resize(elements * bits / 8);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() >> 8);
    };
    fill(a, int64_t{shape.m} * shape.k);
    fill(b, int64_t{shape.n} * shape.k);
    const int64_t c_bytes = int64_t{4} * shape.m * shape.n;
    const int64_t set_bytes = a.size() + b.size() + c_bytes;
    for (int64_t i = 0; i < 2 + 2 * cache_bytes / set_bytes; ++i) {
      CHECK(cudaMalloc(&device_a.emplace_back(), a.size()));
      CHECK(cudaMalloc(&device_b.emplace_back(), b.size()));
      CHECK(cudaMalloc(&device_c.emplace_back(), c_bytes));
      CHECK(cudaMemcpy(device_a[i], a.data(), a.size(), cudaMemcpyHostToDevice));
      CHECK(cudaMemcpy(device_b[i], b.data(), b.size(), cudaMemcpyHostToDevice));
      CHECK(cudaMemset(device_c[i], 0x7f, c_bytes));
    }
  }
  ~Operands() {
    for (size_t i = 0; i < device_a.size(); ++i) {
      CHECK(cudaFree(device_a[i]));
      CHECK(cudaFree(device_b[i]));
      CHECK(cudaFree(device_c[i]));
    }
  }
};

// Whether elements of the last set's result, some at its edges, are right.
bool right(const Operands& operands, const Shape& shape, int bits) {
  std::mt19937 random(1);
  const int64_t row_bytes = int64_t{shape.k} * bits / 8;
  for (int i = 0; i < kSampled; ++i) {
    const int64_t row = i == 0 ? shape.m - 1 : random() % shape.m;
    const int64_t column = i == 0 ? shape.n - 1 : random() % shape.n;
    int32_t found;
    CHECK(cudaMemcpy(&found, operands.device_c.back() + row * shape.n + column, sizeof found,
                     cudaMemcpyDeviceToHost));
    const uint8_t* const b = operands.b.data() + column * row_bytes;
    if (found != dot(operands.a.data() + row * row_bytes, b, row_bytes, bits)) return false;
  }
  return true;
}

double milliseconds(const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaEventRecord(begin));
  launch();
  CHECK(cudaEventRecord(end));
  CHECK(cudaEventSynchronize(end));
  float elapsed;
  CHECK(cudaEventElapsedTime(&elapsed, begin, end));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return elapsed;
}

template <typename T, typename Operator, int kDepth>
bool measure(const Shape& shape, const char* name, int64_t cache_bytes) {
  using Product = Gemm<T, Operator, kDepth>;
  constexpr int kBits = cutlass::sizeof_bits<T>::value;
  const Operands operands(shape, kBits, cache_bytes);
  std::vector<Product> products(operands.device_a.size());
  for (size_t i = 0; i < products.size(); ++i) {
    const auto a = reinterpret_cast<T*>(operands.device_a[i]);
    const auto b = reinterpret_cast<T*>(operands.device_b[i]);
    const auto c = operands.device_c[i];
    const typename Product::Arguments arguments({shape.m, shape.n, shape.k}, {a, shape.k},
                                                {b, shape.k}, {c, shape.n}, {c, shape.n}, {1, 0});
    if (products[i].initialize(arguments) != cutlass::Status::kSuccess) {
      std::fprintf(stderr, "%s: CUTLASS refuses %d x %d x %d\n", name, shape.m, shape.n, shape.k);
      return false;
    }
  }
  const auto once = [&] {
    for (Product& product : products) {
      if (product() != cutlass::Status::kSuccess) CHECK(cudaErrorLaunchFailure);
    }
  };
  once();
  const double first = milliseconds(once);
  const int repeats = std::max(1, static_cast<int>(kSampleMilliseconds / first));
  std::vector<double> times;
  for (int round = 0; round < kRounds; ++round) {
    times.push_back(milliseconds([&] { for (int i = 0; i < repeats; ++i) once(); }));
  }
  std::sort(times.begin(), times.end());
  const double us = 1e3 * times[kRounds / 2] / (repeats * products.size());
  const bool good = right(operands, shape, kBits);
  std::printf("{\"contestant\": \"%s\", \"m\": %d, \"n\": %d, \"k\": %d, \"right\": %s, "
              "\"us\": %.2f, \"tops\": %.1f, \"copies\": %zu}\n",
              name, shape.m, shape.n, shape.k, good ? "true" : "false", us,
              2e-6 * shape.m * shape.n * shape.k / us, products.size());
  return good;
}

int main(int count, char** arguments) {
  if (count < 4 || count % 3 != 1) {
    std::fprintf(stderr, "usage: %s M N K [M N K ...]\n", arguments[0]);
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  const int64_t cache = properties.l2CacheSize;
  using namespace cutlass;
  bool good = true;
  for (int i = 1; i < count; i += 3) {
    const Shape shape{std::atoi(arguments[i]), std::atoi(arguments[i + 1]),
                      std::atoi(arguments[i + 2])};
    good &= measure<int8_t, arch::OpMultiplyAddSaturate, 32>(shape, "CUTLASS int8", cache);
    good &= measure<int4b_t, arch::OpMultiplyAddSaturate, 64>(shape, "CUTLASS int4", cache);
    good &= measure<uint1b_t, arch::OpAndPopc, 256>(shape, "CUTLASS b1", cache);
  }
  CHECK(cudaDeviceSynchronize());
  return good ? 0 : 1;
}

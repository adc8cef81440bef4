// Products of few rows, which take the time of reading the weights once. A block has a tile of 32
// columns, whose weights lie one after another; each of its warps streams a part of K through shared
// memory of its own, and the warps' sums meet at the end. So that nothing has to be launched before,
// a block can quantize a single row itself, while its first weights are on the way.
#pragma once

#include "gemm.cuh"
#include "prologue.cuh"

namespace anyprec::cuda {

template <Method kMethod_, int kBits_, int kSlices>
struct StreamConfig {
  static constexpr Method kMethod = kMethod_;
  static constexpr int kBits = kBits_;
  static constexpr bool kIntegers = false;
  static constexpr Shape kShape = {kTile / 16, kSlices, 1, 1};  // of each warp
  static constexpr int kWords = stream_words(kBits);            // of a stage
  static constexpr int kBlocks = kWords / block_words(kMethod);
  static constexpr int kRowBytes = stream_row_bytes();
  static constexpr int kWeightBytes = kWords * kBits * kRowBytes;
};

// The stages of one warp: its shared memory, and the copies into it.
template <typename Config>
class WarpStream {
 public:
  __device__ WarpStream(const Gemm& p, uint8_t* shared, bool with_values)
      : p_(p), lane_(threadIdx.x % kWarp) {
    value_bytes_ = with_values ? stream_value_bytes(Config::kBlocks, p.passes, p.m) : 0;
    shared_ = shared + threadIdx.x / kWarp * kStreamStages * stage_bytes();
    int64_t before = int64_t{blockIdx.x} * p.words * Config::kBits;
    weights_ = reinterpret_cast<const uint4*>(p.weights + before * kTile) + lane_;
    values_ = reinterpret_cast<const uint4*>(p.payload);
  }

  __device__ uint8_t* stage(int i) const { return shared_ + i * stage_bytes(); }

  // Starts the copies of `kWords` words of K; ends a group of copies in any case.
  __device__ void start(int ring, int stage_of_k, bool there) {
    if (there) {
      copy_weights(stage(ring), stage_of_k);
      if (value_bytes_ != 0) copy_values(stage(ring) + Config::kWeightBytes, stage_of_k);
    }
    commit_copies();
  }

  // The lane's 16 bytes of a row of activations in a block of a stage.
  __device__ uint4 values(const uint8_t* stage, int pass, int block, int row) const {
    const uint8_t* at = stage + Config::kWeightBytes +
                        ((pass * Config::kBlocks + block) * p_.m + row) * kBlockBytes;
    return *reinterpret_cast<const uint4*>(at + lane_ % 4 * 16);
  }

 private:
  static constexpr int kRows = Config::kWords * Config::kBits;
  static constexpr int kRowPieces = kTile * 4 / 16;

  __device__ int stage_bytes() const { return Config::kWeightBytes + value_bytes_; }

  __device__ void copy_weights(uint8_t* to, int stage_of_k) const {
    int rows_left = (p_.words - stage_of_k * Config::kWords) * Config::kBits;
    auto* from = weights_ + int64_t{stage_of_k} * kRows * kRowPieces;
    int first_row = lane_ / kRowPieces;
    to += first_row * Config::kRowBytes + lane_ % kRowPieces * 16;
#pragma unroll
    for (int row = 0; row < kRows; row += kWarp / kRowPieces) {
      if (first_row + row >= kRows) break;
      bool valid = first_row + row < rows_left;
      copy_async(to + row * Config::kRowBytes, from + (valid ? row * kRowPieces : 0), valid);
    }
  }

  // Rows of neighbouring blocks lie one after another.
  __device__ void copy_values(uint8_t* to, int stage_of_k) const {
    constexpr int kPieces = kBlockBytes / 16;
    int block = stage_of_k * Config::kBlocks;
    int count = min(Config::kBlocks, p_.blocks - block) * p_.m * kPieces;
    for (int pass = 0; pass < p_.passes; ++pass) {
      auto* from = values_ + (int64_t{pass} * p_.blocks + block) * p_.m * kPieces;
      for (int i = lane_; i < count; i += kWarp) {
        copy_async(to + (pass * Config::kBlocks * p_.m * kPieces + i) * 16, from + i, true);
      }
    }
  }

  const Gemm& p_;
  int lane_, value_bytes_;
  uint8_t* shared_;
  const uint4* weights_;
  const uint4* values_;
};

// Adds the sums of the block's warps and writes the result, or its part of a split one.
template <int kStrips, int kSlices>
__device__ inline void store_sum_of_warps(const Gemm& p, const float (&y)[kStrips][kSlices][4],
                                          float* shared) {
  constexpr int kCount = kStrips * kSlices * 4;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, q = lane % 4, g = lane / 4;
  __syncthreads();  // no warp reads its stages any more
  for_sums<kStrips, kSlices>([&](int i, int s, int c) {
    shared[(warp * kCount + (i * kSlices + s) * 4 + c) * kWarp + lane] = y[i][s][c];
  });
  __syncthreads();
  for (int at = warp; at < kCount; at += kStreamWarps) {
    int i = at / 4 / kSlices, s = at / 4 % kSlices, c = at % 4;
    int n = blockIdx.x * kTile + 16 * i + 2 * g + c / 2, m = 8 * s + 2 * q + c % 2;
    if (n >= p.n || m >= p.m) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w) sum += shared[(w * kCount + at) * kWarp + lane];
    if (p.splits > 1) {
      static_cast<float*>(p.out)[(int64_t{blockIdx.y} * p.m + m) * p.n + n] = sum;
      continue;
    }
    if (p.bias != nullptr) {
      with_dtype(p.bias_dtype, p.bias, [&](auto* bias) { sum += to_float(bias[n]); });
    }
    const float value[1] = {sum};
    store_pack(p.out_dtype, p.out, int64_t{m} * p.n + n, value, 1, true);
  }
}

// A row quantized by this block, in shared memory, and the product's parameters to read it there.
template <Method kMethod>
__device__ inline Gemm quantize_here(const Stream& p, uint8_t* shared) {
  Prologue prologue = p.prologue;
  Gemm gemm = p.gemm;
  prologue.payload = shared;
  shared += int64_t{gemm.passes} * gemm.blocks * kBlockBytes;
  auto* pieces = reinterpret_cast<float*>(shared);
  prologue.scales = pieces + max(1, gemm.words);
  void* sums = prologue.scales + gemm.act_groups;
  if (prologue.sums != nullptr) prologue.sums = sums;
  gemm.payload = prologue.payload;
  gemm.act_scales = prologue.scales;
  gemm.act_sums = sums;
  constexpr Output kOutput = kMethod == Method::kCodes ? Output::kCodes : Output::kFloat;
  lay_out_row<kOutput, false>(prologue, 0, pieces);
  __syncthreads();
  return gemm;
}

template <Method kMethod, int kBits, int kSlices, template <int, int, int> typename EngineOf>
__device__ inline void stream(const Stream& p) {
  using Config = StreamConfig<kMethod, kBits, kSlices>;
  constexpr int kStrips = Config::kShape.strips;
  extern __shared__ uint4 shared_memory[];
  auto* shared = reinterpret_cast<uint8_t*>(shared_memory);
  bool here = kSlices == 1 && p.quantize;
  WarpStream<Config> copies(p.gemm, shared, !here);

  // Stages of K that this warp has.
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, q = lane % 4, g = lane / 4;
  int all = (p.gemm.words + Config::kWords - 1) / Config::kWords;
  int parts = gridDim.y * kStreamWarps, each = (all + parts - 1) / parts;
  int first = min(all, (static_cast<int>(blockIdx.y) * kStreamWarps + warp) * each);
  int last = min(all, first + each);
  for (int i = 0; i < kStreamStages - 1; ++i) copies.start(i, first + i, first + i < last);
  Gemm gemm = p.gemm;
  if constexpr (kSlices == 1) {
    if (here) gemm = quantize_here<kMethod>(p, shared + p.quantize_at);
  }

  constexpr int kBlockWords = block_words(kMethod);
  bool counted = kMethod == Method::kCodes && counts_from_bits<kBits>(gemm);
  using Engine = EngineOf<kBits, kStrips, kSlices>;
  using Value = typename Engine::Value;
  Engine engine;
  fill(engine.t, counted ? static_cast<Value>(kCountedBits) : Value{0});
  float y[kStrips][kSlices][4];
  fill(y, 0.0f);
  Place at = {static_cast<int>(blockIdx.x) * kTile + 2 * g, 2 * q};
  int group = first * Config::kWords / gemm.group_words;
  int left = (group + 1) * gemm.group_words - first * Config::kWords;  // words of the group
  int last_word = min(gemm.words, last * Config::kWords) - 1;
  const uint8_t* data;
  auto read_values = [&](int pass, int b, int block, uint4(&x)[kSlices]) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if (here) {
        int64_t from = (int64_t{pass} * gemm.blocks + block) * kBlockBytes + q * 16;
        x[s] = *reinterpret_cast<const uint4*>(gemm.payload + from);
      } else {
        x[s] = copies.values(data, pass, b, min(8 * s + g, gemm.m - 1));
      }
    }
  };
  for (int i = first; i < last; ++i) {
    wait_copies<kStreamStages - 2>();
    __syncwarp();  // all lanes' copies are visible, and nobody reads the stage next written
    copies.start((i - first + kStreamStages - 1) % kStreamStages, i + kStreamStages - 1,
                 i + kStreamStages - 1 < last);
    data = copies.stage((i - first) % kStreamStages);
#pragma unroll 1
    for (int b = 0; b < Config::kBlocks; ++b) {
      int block = i * Config::kBlocks + b;
      Stage<Config::kRowBytes> stage = {
          data + b * kBlockWords * kBits * Config::kRowBytes + 2 * g * 4, nullptr};
      uint4 x[kSlices];
#pragma unroll
      for (int w = 0; w < kBlockWords; ++w) {
        int word = block * kBlockWords + w;
        if (word >= gemm.words) break;
        // Blocks of several words have a single pass.
        for (int pass = 0; pass < gemm.passes; ++pass) {
          if (w == 0) read_values(pass, b, block, x);
          engine.multiply(q, stage, x, w);
        }
        bool ends = --left == 0 || word + 1 == gemm.words;
        if (ends || word == last_word) {
          end_group<Config>(gemm, at, group, ends, counted, engine, y);
          ++group;
          left = gemm.group_words;
        }
      }
    }
  }
  store_sum_of_warps(gemm, y, reinterpret_cast<float*>(shared));
}

}  // namespace anyprec::cuda

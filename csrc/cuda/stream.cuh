// Products of few rows, which take the time of reading the weights once. A block has one tile of 32
// columns, or two, whose weights lie one after another; each of its warps streams a part of K
// through shared memory of its own, and the warps' sums meet at the end. Blocks that share K out
// among them are a cluster, and add their sums in shared memory too. So that nothing has to be
// launched before, blocks can quantize a single row themselves, while first weights are on the way.
#pragma once

#include <type_traits>

#include "gemm.cuh"
#include "prologue.cuh"

namespace anyprec::cuda {

// Warps have all columns of their block: two strips of each tile, and as many slices as tiles.
template <Method kMethod_, int kBits_, int kTiles_>
struct StreamConfig {
  static constexpr Method kMethod = kMethod_;
  static constexpr int kBits = kBits_, kTiles = kTiles_;
  static constexpr bool kIntegers = false;
  static constexpr Shape kShape = {2 * kTiles, kTiles, 1, 1};
  static constexpr int kWords = stream_words(kMethod, kBits, kTiles);  // of a stage
  static constexpr int kBlocks = kWords / block_words(kMethod);
  static constexpr int kRowBytes = stream_row_bytes(kTiles);
  static constexpr int kWeightBytes = kWords * kBits * kRowBytes;
};

// The stages of one warp: its shared memory, and the copies into it.
template <typename Config>
class WarpStream {
 public:
  // For the stages of K before `last`.
  __device__ WarpStream(const Stream& p, uint8_t* shared, int last)
      : p_(p.gemm),
        lane_(threadIdx.x % kWarp),
        ahead_(p.stages - 1),
        last_(last),
        policy_(evict_first()) {
    bool quantizes = Config::kTiles == 1 && p.quantizes;
    value_bytes_ = quantizes ? 0 : stream_value_bytes(Config::kBlocks, p_.passes, p_.m);
    end_ = p.stages * stage_bytes();
    shared_ = shared + threadIdx.x / kWarp * end_;
    // A tile past the end is computed like the last one, and not stored.
    int tile = blockIdx.x * Config::kTiles + lane_ % kRowPieces / kTilePieces;
    int64_t row = int64_t{min(tile, static_cast<int>(tiles(p_.n)) - 1)} * p_.words * Config::kBits +
                  lane_ / kRowPieces;
    weights_ = reinterpret_cast<const uint4*>(p_.weights) + row * kTilePieces + lane_ % kTilePieces;
    values_ = reinterpret_cast<const uint4*>(p_.payload);
  }

  // Starts the copies of the first stages. Their weights don't depend on the launch before.
  __device__ void begin(int first) {
    for (int i = 0; i < ahead_; ++i) copy_weights(i * stage_bytes(), first + i);
    wait_for_launch_before();
    for (int i = 0; i < ahead_; ++i) {
      copy_values(write_, first + i);
      end_copies();
    }
  }

  // Waits for the next stage, `stage_of_k`, and starts the copies of the one that takes the place
  // of the last.
  __device__ const uint8_t* next(int stage_of_k) {
    wait_copies(ahead_ - 1);
    __syncwarp();  // all lanes' copies are visible, and nobody reads the stage next written
    copy_weights(write_, stage_of_k + ahead_);
    copy_values(write_, stage_of_k + ahead_);
    end_copies();
    const uint8_t* stage = shared_ + read_;
    read_ = after(read_);
    return stage;
  }

  // The lane's 16 bytes of a row of activations in a block of a stage.
  __device__ uint4 values(const uint8_t* stage, int pass, int block, int row) const {
    const uint8_t* at = stage + Config::kWeightBytes +
                        ((pass * Config::kBlocks + block) * p_.m + row) * kBlockBytes;
    return *reinterpret_cast<const uint4*>(at + lane_ % 4 * 16);
  }

 private:
  static constexpr int kRows = Config::kWords * Config::kBits;
  static constexpr int kTilePieces = kTile * 4 / 16;
  static constexpr int kRowPieces = Config::kTiles * kTilePieces;

  __device__ int stage_bytes() const { return Config::kWeightBytes + value_bytes_; }
  __device__ int after(int stage) const {
    stage += stage_bytes();
    return stage == end_ ? 0 : stage;
  }

  // Ends a group of copies, which may be empty, so that groups are counted like stages.
  __device__ void end_copies() {
    commit_copies();
    write_ = after(write_);
  }

  __device__ void copy_weights(int stage, int stage_of_k) const {
    if (stage_of_k >= last_) return;
    int first_row = lane_ / kRowPieces;
    int rows = min(kRows, (p_.words - stage_of_k * Config::kWords) * Config::kBits) - first_row;
    auto* from = weights_ + int64_t{stage_of_k} * kRows * kTilePieces;
    uint8_t* to = shared_ + stage + first_row * Config::kRowBytes + lane_ % kRowPieces * 16;
#pragma unroll
    for (int row = 0; row < kRows; row += kWarp / kRowPieces) {
      if (row < rows) copy_async(to + row * Config::kRowBytes, from + row * kTilePieces, policy_);
    }
  }

  // Rows of neighbouring blocks lie one after another.
  __device__ void copy_values(int stage, int stage_of_k) const {
    if (value_bytes_ == 0 || stage_of_k >= last_) return;
    constexpr int kPieces = kBlockBytes / 16;
    uint8_t* to = shared_ + stage + Config::kWeightBytes;
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
  int lane_, ahead_, last_, value_bytes_;
  int read_ = 0, write_ = 0, end_;  // stages, as bytes in shared memory
  uint64_t policy_;
  uint8_t* shared_;
  const uint4* weights_;
  const uint4* values_;
};

// Brings scales, offsets, bias and residual to the L2 cache, so that ends of groups don't wait for
// memory: those of the block's columns, for words first .. last - 1 of K.
template <typename Config>
__device__ inline void prefetch_factors(const Stream& stream, int first, int last) {
  const Gemm& p = stream.gemm;
  int lane = threadIdx.x % kWarp, last_group = min(p.groups, (last - 1) / p.group_words + 1) - 1;
  auto row = [](const void* rows, DType dtype, int64_t at) {
    prefetch(static_cast<const uint8_t*>(rows) + at * (dtype == DType::kF32 ? 4 : 2));
  };
#pragma unroll
  for (int i = 0; i < Config::kTiles; ++i) {
    int tile = blockIdx.x * Config::kTiles + i;
    if (tile >= tiles(p.n)) break;
    for (int group = first / p.group_words + lane; group <= last_group; group += kWarp) {
      int64_t at = (int64_t{tile} * p.groups + group) * kTile;
      row(p.scales, p.scale_dtype, at);
      if (p.offsets != nullptr) row(p.offsets, p.offset_dtype, at);
    }
    int n = tile * kTile, m = threadIdx.x;
    if (p.bias != nullptr && m == 0) row(p.bias, p.bias_dtype, n);
    if (stream.residual != nullptr && m < p.m) {
      row(stream.residual, stream.residual_dtype, int64_t{m} * p.n + n);
    }
  }
}

// Writes result `at` of the block, numbered as in store_sums(), or its part of a split one.
template <typename Config>
__device__ inline void store_sum(const Stream& stream, int at, float sum, bool part) {
  const Gemm& p = stream.gemm;
  int lane = at % kWarp, c = at / kWarp % 4, q = lane % 4, g = lane / 4;
  int i = at / kWarp / 4 / Config::kShape.slices, s = at / kWarp / 4 % Config::kShape.slices;
  int n = blockIdx.x * Config::kShape.columns() + 16 * i + 2 * g + c / 2, m = 8 * s + 2 * q + c % 2;
  if (n >= p.n || m >= p.m) return;
  if (part) {
    static_cast<float*>(p.out)[(int64_t{blockIdx.y} * p.m + m) * p.n + n] = sum;
    return;
  }
  if (p.bias != nullptr) sum += load(p.bias_dtype, p.bias, n);
  int64_t where = int64_t{m} * p.n + n;
  if (stream.residual != nullptr) sum += load(stream.residual_dtype, stream.residual, where);
  const float value[1] = {sum};
  store_pack(p.out_dtype, p.out, where, value, 1, true);
}

// Adds the sums of the block's warps and, in a cluster, of its blocks, each of which adds and
// writes a share of the results.
template <typename Config, typename Sums>
__device__ inline void store_sums(const Stream& p, const Sums& y, float* shared) {
  constexpr int kSlices = Config::kShape.slices;
  constexpr int kCount = stream_sums(Config::kTiles), kThreads = kStreamWarps * kWarp;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // no warp reads its stages any more
  for_sums<Config::kShape.strips, kSlices>([&](int i, int s, int c) {
    shared[warp * kCount + ((i * kSlices + s) * 4 + c) * kWarp + lane] = y[i][s][c];
  });
  __syncthreads();
  for (int at = threadIdx.x; at < kCount; at += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w) sum += shared[w * kCount + at];
    if (p.clustered) {
      shared[at] = sum;  // only this thread reads or writes it until the barrier
    } else {
      store_sum<Config>(p, at, sum, p.gemm.splits > 1);
    }
  }
  if (!p.clustered) return;
  arrive_at_cluster();
  wait_for_cluster();
  constexpr int kMost = std::max(1, kCount / 2 / kThreads);  // results of a thread
  int share = kCount / p.gemm.splits, first = blockIdx.y * share;
  float sums[kMost] = {};
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    int i = j * kThreads + threadIdx.x;
    for (int block = 0; i < share && block < p.gemm.splits; ++block) {
      sums[j] += load_of_block(shared + first + i, block);
    }
  }
  arrive_at_cluster();  // a block's shared memory is there until the others have read it
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    int i = j * kThreads + threadIdx.x;
    if (i < share) store_sum<Config>(p, first + i, sums[j], false);
  }
  wait_for_cluster();
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
  lay_out_row<kOutput, false, true>(prologue, 0, pieces);
  __syncthreads();
  return gemm;
}

template <Method kMethod, int kBits, int kTiles>
__device__ inline void stream(const Stream& p) {
  using Config = StreamConfig<kMethod, kBits, kTiles>;
  constexpr int kStrips = Config::kShape.strips, kSlices = Config::kShape.slices;
  extern __shared__ uint4 shared_memory[];
  auto* shared = reinterpret_cast<uint8_t*>(shared_memory);
  bool quantizes = kTiles == 1 && p.quantizes;

  // Stages of K that this warp has.
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, q = lane % 4, g = lane / 4;
  int all = (p.gemm.words + Config::kWords - 1) / Config::kWords;
  int parts = p.gemm.splits * kStreamWarps, each = (all + parts - 1) / parts;
  int first = min(all, (static_cast<int>(blockIdx.y) * kStreamWarps + warp) * each);
  int last = min(all, first + each);
  WarpStream<Config> copies(p, shared, last);
  prefetch_factors<Config>(p, first * Config::kWords, last * Config::kWords);
  copies.begin(first);
  begin_next_launch();  // it adds parts
  Gemm gemm = p.gemm;
  if constexpr (kTiles == 1) {
    if (quantizes) gemm = quantize_here<kMethod>(p, shared + p.quantize_at);
  }

  constexpr int kBlockWords = block_words(kMethod);
  bool counted = kMethod == Method::kCodes && counts_from_bits<kBits>(gemm);
  using Engine = std::conditional_t<kMethod == Method::kCodes, CodesEngine<kBits, kStrips, kSlices>,
                                    FloatEngine<kBits, kStrips, kSlices>>;
  using Value = typename Engine::Value;
  Engine engine;
  fill(engine.t, counted ? static_cast<Value>(kCountedBits) : Value{0});
  float y[kStrips][kSlices][4];
  fill(y, 0.0f);
  Place at = {static_cast<int>(blockIdx.x) * Config::kShape.columns() + 2 * g, 2 * q};
  int group = first * Config::kWords / gemm.group_words;
  int left = (group + 1) * gemm.group_words - first * Config::kWords;  // words of the group
  for (int i = first; i < last; ++i) {
    const uint8_t* data = copies.next(i);
#pragma unroll 1
    for (int b = 0; b < Config::kBlocks; ++b) {
      int block = i * Config::kBlocks + b;
      if (block >= gemm.blocks) break;
      auto read_values = [&](int pass, uint4(&x)[kSlices]) {
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          if (quantizes) {
            int64_t from = (int64_t{pass} * gemm.blocks + block) * kBlockBytes + q * 16;
            x[s] = *reinterpret_cast<const uint4*>(gemm.payload + from);
          } else {
            x[s] = copies.values(data, pass, b, min(8 * s + g, gemm.m - 1));
          }
        }
      };
      Stage<Config::kRowBytes> stage = {
          data + b * kBlockWords * kBits * Config::kRowBytes + 2 * g * 4, nullptr};
      uint4 x[kSlices];
      read_values(0, x);
#pragma unroll
      for (int w = 0; w < kBlockWords; ++w) {
        int word = block * kBlockWords + w;
        if (word >= gemm.words) break;
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          auto weights = Engine::weights(q, stage, strip, w);
          engine.multiply(strip, weights, x, w);
          if constexpr (kMethod == Method::kFloat) {
            for (int pass = 1; pass < gemm.passes; ++pass) {  // of the same weights
              uint4 part[kSlices];
              read_values(pass, part);
              engine.multiply(strip, weights, part, w);
            }
          }
        }
        bool ends = --left == 0 || word + 1 == gemm.words;
        if (ends || word + 1 == last * Config::kWords) {
          end_group<Config>(gemm, at, group, ends, counted, engine, y);
          ++group;
          left = gemm.group_words;
        }
      }
    }
  }
  store_sums<Config>(p, y, reinterpret_cast<float*>(shared));
}

}  // namespace anyprec::cuda

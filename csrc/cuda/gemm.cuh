// The product kernels: tiles of weights and activations stream through shared memory, an engine
// multiplies them, and scales are applied in registers. Results are written once.
#pragma once

#include <type_traits>

#include "engines.cuh"
#include "epilogue.cuh"

namespace anyprec::cuda {

constexpr int kWarp = 32;
constexpr int kTileGroup = 8;  // tiles of rows that share the weights that are in the L2 cache

// The tile of the result that this block computes.
struct TileOrigin {
  int n, m;
};
template <typename Config>
__device__ inline TileOrigin tile_origin(const Gemm& p) {
  constexpr Shape kShape = Config::kShape;
  int tiles_n = (p.n + kShape.columns() - 1) / kShape.columns();
  int tiles_m = (p.m + kShape.rows() - 1) / kShape.rows();
  int id = blockIdx.x, width = kTileGroup * tiles_n;
  int first = id / width * kTileGroup;
  int size = min(tiles_m - first, kTileGroup);
  return {id % width / size * kShape.columns(), (first + id % width % size) * kShape.rows()};
}

template <Method kMethod_, int kBits_, Tile kTile_>
struct Config {
  static constexpr Method kMethod = kMethod_;
  static constexpr int kBits = kBits_;
  static constexpr bool kIntegers = has_integers(kMethod, kTile_);
  static constexpr Shape kShape = tile_shape(kMethod, kBits, kTile_);
  static constexpr int kThreads = kShape.threads();
  static constexpr int kWords = block_words(kMethod);
  static constexpr int kStages = stage_count(kMethod, kBits, kShape);
  static constexpr int kStageBytes = stage_bytes(kMethod, kBits, kShape);
  static constexpr int kRowBytes = weight_row_bytes(kShape);
  static constexpr int kWeightBytes = kBits * kWords * kRowBytes;
  static_assert(kStages >= 2, "copies can't run ahead");
};

// Copies the blocks of a tile into shared memory, one after another and pass after pass. A thread
// copies pieces of 16 bytes that lie apart by constants: of weights the same four columns in every
// kRowStep-th row, of activations every kThreads-th piece.
template <typename Config>
class Loader {
 public:
  __device__ Loader(const Gemm& p, const TileOrigin& origin, uint8_t* shared, int first, int last)
      : p_(p), first_(first), last_(last), block_(first), pass_(0) {
    int piece = threadIdx.x % kRowPieces, column = origin.n + piece * 4;
    row_ = threadIdx.x / kRowPieces;
    inside_ = column < tiles(p.n) * kTile;
    // Where nothing is read there still is an address.
    int64_t tile = inside_ ? column / kTile : 0;
    weights_ = reinterpret_cast<const uint4*>(p.weights) + tile * p.words * kBits * kTilePieces +
               piece % kTilePieces;
    to_ = shared + row_ * Config::kRowBytes + piece * 16;
    rows_left_ = p.m - origin.m;
    values_ = reinterpret_cast<const uint4*>(p.payload) + int64_t{origin.m} * kBlockPieces;
  }

  // Starts the copies of the first blocks. Their weights don't depend on the launch before.
  __device__ void begin() {
    Loader weights = *this;
    for (int i = 0; i < Config::kStages - 1; ++i) weights.start<true, false>(i);
    wait_for_launch_before();
    for (int i = 0; i < Config::kStages - 1; ++i) start<false, true>(i), commit_copies();
  }

  // Starts the copies of the next block, if there is one. Ends a group of copies in any case, so
  // that groups are counted like blocks.
  __device__ void next(int stage) { start<true, true>(stage), commit_copies(); }

 private:
  static constexpr int kBits = Config::kBits, kWords = Config::kWords;
  static constexpr int kTilePieces = kTile * 4 / 16;
  static constexpr int kRowPieces = Config::kShape.columns() / 4;
  static constexpr int kRowStep = Config::kThreads / kRowPieces;
  static constexpr int kRows = kBits * kWords;
  static constexpr int kBlockPieces = kBlockBytes / 16;
  static_assert(Config::kThreads % kRowPieces == 0);
  static_assert(Config::kMethod != Method::kPlanes || kWords % kRowStep == 0);

  template <bool kWeights, bool kActivations>
  __device__ void start(int stage) {
    if (pass_ >= p_.passes || first_ >= last_) return;
    if (kWeights) copy_weights(to_ + stage * Config::kStageBytes);
    if (kActivations) copy_values(to_ + stage * Config::kStageBytes);
    if (++block_ == last_) block_ = first_, ++pass_;
  }

  // Rows of shared memory are fields of words, as in tiles; for planes words of fields.
  __device__ void copy_weights(uint8_t* to) const {
    int words_left = p_.words - block_ * kWords;
    auto* from = weights_ + int64_t{block_} * kRows * kTilePieces;
#pragma unroll
    for (int row = 0; row < kRows; row += kRowStep) {
      bool there = kRows % kRowStep == 0 || row_ + row < kRows;
      if (!there) break;
      if constexpr (Config::kMethod == Method::kPlanes) {
        int word = row_ + row % kWords;
        bool valid = inside_ && word < words_left;
        copy_async(to + row * Config::kRowBytes,
                   from + (valid ? (word * kBits + row / kWords) * kTilePieces : 0), valid);
      } else {
        bool valid = inside_ && row_ + row < words_left * kBits;
        copy_async(to + row * Config::kRowBytes, from + (valid ? (row_ + row) * kTilePieces : 0),
                   valid);
      }
    }
  }

  __device__ void copy_values(uint8_t* to) const {
    constexpr int kPieces = Config::kShape.rows() * kBlockPieces;
    // From the thread's place among rows of weights to that among activations.
    to += Config::kWeightBytes + threadIdx.x * 16 - row_ * Config::kRowBytes -
          threadIdx.x % kRowPieces * 16;
    auto* from = values_ + (int64_t{pass_} * p_.blocks + block_) * p_.m * kBlockPieces;
#pragma unroll
    for (int first = 0; first < kPieces; first += Config::kThreads) {
      int i = first + threadIdx.x;
      if (kPieces % Config::kThreads != 0 && i >= kPieces) break;
      bool valid = i < rows_left_ * kBlockPieces;
      copy_async(to + first * 16, from + (valid ? i : 0), valid);
    }
  }

  const Gemm& p_;
  int first_, last_, block_, pass_;
  int row_, rows_left_;
  bool inside_;
  const uint4* weights_;
  const uint4* values_;
  uint8_t* to_;
};

// Runs step(stage, block, pass) over the blocks first .. last - 1 of each pass, while copies for the
// next ones are under way. Calls next_pass() between passes.
template <typename Config, typename Step, typename NextPass>
__device__ inline void for_blocks(const Gemm& p, const TileOrigin& origin, uint8_t* shared,
                                  int first, int last, const Step& step,
                                  const NextPass& next_pass) {
  Loader<Config> loader(p, origin, shared, first, last);
  loader.begin();
  begin_next_launch();  // all that runs later adds parts
  int stage = 0, ahead = Config::kStages - 1;
  for (int pass = 0; pass < p.passes; ++pass) {
    if (pass > 0) next_pass();
    for (int block = first; block < last; ++block) {
      wait_copies<Config::kStages - 2>();
      __syncthreads();  // all copies are visible, and nobody reads the stage that is next written
      loader.next(ahead);
      step(shared + stage * Config::kStageBytes, block, pass);
      stage = stage + 1 == Config::kStages ? 0 : stage + 1;
      ahead = ahead + 1 == Config::kStages ? 0 : ahead + 1;
    }
  }
}

// The place of a lane in its warp and of the warp's part in a tile.
template <typename Config>
struct Lane {
  static constexpr Shape kShape = Config::kShape;
  int q, g, column, row;  // of the lane in a strip and a slice, and where the warp's part begins

  __device__ Lane() {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    q = lane % 4, g = lane / 4;
    column = warp % kShape.warps_n * kShape.strips * 16;
    row = warp / kShape.warps_n * kShape.slices * 8;
  }
  __device__ Place place(const TileOrigin& origin) const {
    return {origin.n + column + 2 * g, origin.m + row + 2 * q};
  }
  __device__ Stage<Config::kRowBytes> stage(const uint8_t* at) const {
    return {at + (column + 2 * g) * 4,
            at + Config::kWeightBytes + (row + g) * kBlockBytes + q * 16};
  }
};

template <int kSlices, typename Stage>
__device__ inline void read_values(const Stage& stage, uint4 (&x)[kSlices]) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) x[s] = stage.values(s);
}

template <typename Engine, typename Stage, int kSlices>
__device__ inline void multiply(Engine& engine, int q, const Stage& stage,
                                const uint4 (&x)[kSlices], int word) {
#pragma unroll
  for (int i = 0; i < std::extent_v<decltype(engine.t)>; ++i) {
    engine.multiply(i, Engine::weights(q, stage, i, word), x, word);
  }
}

template <typename T, int kStrips, int kSlices>
__device__ inline void fill(T (&t)[kStrips][kSlices][4], T value) {
  for_sums<kStrips, kSlices>([&](int i, int s, int c) { t[i][s][c] = value; });
}

// Blocks of K that this part of a split product has.
__device__ inline int first_block(const Gemm& p) { return blockIdx.y * p.split_blocks; }
__device__ inline int last_block(const Gemm& p) {
  return min(p.blocks, static_cast<int>(blockIdx.y + 1) * p.split_blocks);
}

// Sums of a group that lie in -2^22 .. 2^22 - 1 are counted from the bits of 1.5 * 2^23 on, so that
// they are floats at once: conversion is a subtraction, where an instruction for it is slow.
constexpr int32_t kCountedBits = 0x4b400000;
constexpr float kCountedFrom = 0x1.8p23f;

template <int kBits>
__device__ inline bool counts_from_bits(const Gemm& p) {
  return int64_t{p.group_words} * kWordBits * 128 * max_level(kBits) < 1 << 22;
}

// Adds a group's part to y and starts the next one.
template <typename Config, typename Engine, typename Y>
__device__ inline void end_group(const Gemm& p, const Place& at, int group, bool with_sums,
                                 bool counted, Engine& engine, Y& y) {
  constexpr int kStrips = Config::kShape.strips, kSlices = Config::kShape.slices;
  auto& t = engine.t;
  // A strip at a time has fewer factors in registers.
  auto add = [&](const auto& sum) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      Factors<1, kSlices> factors;
      Place strip = {at.column(i), at.first_row};
      if constexpr (Config::kMethod == Method::kFloat) {
        factors.template load_floats<Config::kBits>(p, strip, group, with_sums);
      } else {
        factors.template load_codes<Config::kBits>(p, strip, group, with_sums);
      }
      for_sums<1, kSlices>([&](int, int s, int c) {
        y[i][s][c] = factors.add(y[i][s][c], 0, s, c, sum(t[i][s][c]));
      });
    }
  };
  if constexpr (Config::kMethod == Method::kFloat) {
    add([](float x) { return x; });
    fill(t, 0.0f);
  } else {
    int zero = counted ? kCountedBits : 0;
    if (Config::kIntegers && p.integers) {
      store_integers<Config::kBits, kStrips, kSlices>(
          p, at, group, act_unit(p.act_bits),
          [&](int i, int s, int c) { return t[i][s][c] - zero; });
    } else {
      if (!counted) {
        for_sums<kStrips, kSlices>([&](int i, int s, int c) {
          t[i][s][c] = __float_as_int(static_cast<float>(t[i][s][c]));
        });
      }
      float from = counted ? kCountedFrom : 0.0f;
      add([from](int32_t x) { return __int_as_float(x) - from; });
    }
    fill(t, zero);
  }
}

// Products by codes or of floats, with scales applied at the end of each group.
template <typename Config, template <int, int, int> typename EngineOf>
__device__ inline void gemm_grouped(const Gemm& p, uint8_t* shared) {
  constexpr Shape kShape = Config::kShape;
  using Engine = EngineOf<Config::kBits, kShape.strips, kShape.slices>;
  using Value = typename Engine::Value;
  TileOrigin origin = tile_origin<Config>(p);
  Lane<Config> lane;
  Place at = lane.place(origin);
  bool counted = Config::kMethod == Method::kCodes && counts_from_bits<Config::kBits>(p);
  Engine engine;
  fill(engine.t, counted ? static_cast<Value>(kCountedBits) : Value{0});
  float y[kShape.strips][kShape.slices][4];
  fill(y, 0.0f);
  int first = first_block(p), last = last_block(p);
  int last_word = min(p.words, last * Config::kWords) - 1;
  for_blocks<Config>(
      p, origin, shared, first, last,
      [&](const uint8_t* data, int block, int pass) {
        auto stage = lane.stage(data);
        uint4 x[kShape.slices];
        read_values(stage, x);
#pragma unroll
        for (int i = 0; i < Config::kWords; ++i) {
          multiply(engine, lane.q, stage, x, i);
          int word = block * Config::kWords + i, group = word / p.group_words;
          bool ends = (word + 1) % p.group_words == 0 || word + 1 == p.words;
          // The group's sum of activations counts once.
          if (word < p.words && (ends || word == last_word)) {
            end_group<Config>(p, at, group, ends && pass == 0, counted, engine, y);
          }
        }
      },
      [] {});
  if (p.integers) return;
  store<kShape.strips, kShape.slices>(p, at, [&](int i, int s, int c) { return y[i][s][c]; });
}

// Writes the result of a single group whose sums are sum(strip, slice, c).
template <typename Config, typename Sum>
__device__ inline void finish(const Gemm& p, const Place& at, int unit, const Sum& sum) {
  constexpr int kStrips = Config::kShape.strips, kSlices = Config::kShape.slices;
  if constexpr (Config::kMethod != Method::kFloat) {
    if (Config::kIntegers && p.integers) {
      store_integers<Config::kBits, kStrips, kSlices>(p, at, 0, unit, sum);
      return;
    }
  }
  Factors<kStrips, kSlices> factors;
  bool with_sums = last_block(p) == p.blocks;  // in one of the parts of a split product
  if constexpr (Config::kMethod == Method::kFloat) {
    factors.template load_floats<Config::kBits>(p, at, 0, with_sums);
  } else {
    factors.template load_codes<Config::kBits>(p, at, 0, with_sums);
  }
  store<kStrips, kSlices>(p, at, [&](int i, int s, int c) {
    return factors.add(0.0f, i, s, c, static_cast<float>(sum(i, s, c)));
  });
}

// Products by codes or of floats with a single group: sums stay as they are to the end.
template <typename Config, template <int, int, int> typename EngineOf>
__device__ inline void gemm_whole(const Gemm& p, uint8_t* shared) {
  constexpr Shape kShape = Config::kShape;
  using Engine = EngineOf<Config::kBits, kShape.strips, kShape.slices>;
  TileOrigin origin = tile_origin<Config>(p);
  Lane<Config> lane;
  Engine engine;
  fill(engine.t, typename Engine::Value{0});
  for_blocks<Config>(
      p, origin, shared, first_block(p), last_block(p),
      [&](const uint8_t* data, int, int) {
        auto stage = lane.stage(data);
        uint4 x[kShape.slices];
        read_values(stage, x);
#pragma unroll
        for (int i = 0; i < Config::kWords; ++i) multiply(engine, lane.q, stage, x, i);
      },
      [] {});
  finish<Config>(p, lane.place(origin), act_unit(p.act_bits),
                 [&](int i, int s, int c) { return engine.t[i][s][c]; });
}

// Products by planes, whose weights have a single group.
template <typename Config>
__device__ inline void gemm_planes(const Gemm& p, uint8_t* shared) {
  constexpr Shape kShape = Config::kShape;
  TileOrigin origin = tile_origin<Config>(p);
  Lane<Config> lane;
  PlanesEngine<Config::kBits, kShape.strips, kShape.slices> engine{};
  for_blocks<Config>(
      p, origin, shared, first_block(p), last_block(p),
      [&](const uint8_t* data, int, int pass) {
        auto stage = lane.stage(data);
        uint4 x[kShape.slices];
        read_values(stage, x);
        engine.multiply(lane.q, stage, x, pass + 1 == p.passes);
      },
      [&] { engine.next_plane(); });
  int centre = act_centre(p.act_bits);
  finish<Config>(p, lane.place(origin), 1,
                 [&](int i, int s, int c) { return engine.sum(i, s, c, centre); });
}

template <Method kMethod, int kBits, Tile kTile>
__device__ inline void gemm(const Gemm& p) {
  extern __shared__ uint4 shared_memory[];
  auto* shared = reinterpret_cast<uint8_t*>(shared_memory);
  using Kernel = Config<kMethod, kBits, kTile>;
  if constexpr (kMethod == Method::kPlanes) {
    gemm_planes<Kernel>(p, shared);
  } else if constexpr (kMethod == Method::kCodes) {
    if constexpr (kTile == Tile::kWhole) {
      gemm_whole<Kernel, CodesEngine>(p, shared);
    } else {
      gemm_grouped<Kernel, CodesEngine>(p, shared);
    }
  } else {
    if constexpr (kTile == Tile::kWhole) {
      gemm_whole<Kernel, FloatEngine>(p, shared);
    } else {
      gemm_grouped<Kernel, FloatEngine>(p, shared);
    }
  }
}

}  // namespace anyprec::cuda

// The product kernels: tiles of weights and activations stream through shared memory, an engine
// multiplies them, and scales are applied in registers. Results are written once.
#pragma once

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
  static constexpr Shape kShape = tile_shape(kMethod, kBits, kTile_);
  static constexpr int kThreads = kShape.threads();
  static constexpr int kWords = block_words(kMethod);
  static constexpr int kStages = stage_count(kMethod, kBits, kShape);
  static constexpr int kStageBytes = stage_bytes(kMethod, kBits, kShape);
  static constexpr int kRowBytes = weight_row_bytes(kShape);
  static constexpr int kWeightBytes = kBits * kWords * kRowBytes;
  static_assert(kStages >= 2, "copies can't run ahead");
};

// Row of shared memory for a field of a word, among those of a block.
template <typename Config>
__device__ constexpr int weight_row(int word, int field) {
  return Config::kMethod == Method::kPlanes ? field * Config::kWords + word
                                            : word * Config::kBits + field;
}

// Starts the copies of block `block` of K and pass `pass` into a stage. Places are counted in pieces
// of 16 bytes, of which 32 bits can tell 64 GiB.
template <typename Config>
__device__ inline void load_stage(const Gemm& p, const TileOrigin& origin, uint8_t* stage,
                                  int block, int pass) {
  constexpr int kRows = Config::kBits * Config::kWords;     // of a column's words in a block
  constexpr int kPieces = kTile * 4 / 16;                   // of a tile's row
  constexpr int kAll = Config::kShape.columns() / kTile * kRows * kPieces;
  auto* weights = reinterpret_cast<const uint4*>(p.weights);
  uint32_t tile_pieces = static_cast<uint32_t>(p.words) * Config::kBits * kPieces;
  uint32_t first_piece = origin.n / kTile * tile_pieces + block * kRows * kPieces;
  // Not more at once, because addresses would fill the registers.
#pragma unroll 2
  for (int first = 0; first < kAll; first += Config::kThreads) {
    int i = first + threadIdx.x;
    if (kAll % Config::kThreads != 0 && i >= kAll) break;
    int tile = i / (kRows * kPieces), piece = i % (kRows * kPieces);
    int row = piece / kPieces, word = row / Config::kBits, field = row % Config::kBits;
    bool valid = origin.n + tile * kTile < p.n && block * Config::kWords + word < p.words;
    copy_async(stage + weight_row<Config>(word, field) * Config::kRowBytes + tile * 128 +
                   piece % kPieces * 16,
               weights + (valid ? first_piece + tile * tile_pieces + piece : 0), valid);
  }
  constexpr int kValues = Config::kShape.rows() * kBlockBytes / 16;
  auto* values = reinterpret_cast<const uint4*>(p.payload);
  uint32_t rows_before = (static_cast<uint32_t>(pass) * p.blocks + block) * p.m + origin.m;
#pragma unroll
  for (int first = 0; first < kValues; first += Config::kThreads) {
    int i = first + threadIdx.x;
    if (kValues % Config::kThreads != 0 && i >= kValues) break;
    bool valid = origin.m + i / 4 < p.m;
    copy_async(stage + Config::kWeightBytes + i * 16, values + (valid ? rows_before * 4 + i : 0),
               valid);
  }
}

// Runs step(stage, block, pass) over the blocks first .. last - 1 of each pass, while copies for the
// next stages are under way. Calls next_pass() between passes.
template <typename Config, typename Step, typename NextPass>
__device__ inline void for_blocks(const Gemm& p, const TileOrigin& origin, uint8_t* shared,
                                  int first, int last, const Step& step,
                                  const NextPass& next_pass) {
  struct Position {
    int block, pass;
  };
  auto advance = [&](Position& at) {
    if (++at.block == last) at = {first, at.pass + 1};
  };
  int total = (last - first) * p.passes;
  Position ahead = {first, 0};
  auto start = [&](int i) {
    if (i < total) {
      load_stage<Config>(p, origin, shared + i % Config::kStages * Config::kStageBytes, ahead.block,
                         ahead.pass);
      advance(ahead);
    }
    commit_copies();  // empty ones too, so that counts of groups stay those of stages
  };
  for (int i = 0; i < Config::kStages - 1; ++i) start(i);
  Position at = {first, 0};
  for (int i = 0; i < total; ++i) {
    wait_copies<Config::kStages - 2>();
    __syncthreads();  // all copies are visible, and nobody reads the stage that is next written
    start(i + Config::kStages - 1);
    if (at.block == first && at.pass > 0) next_pass();
    step(shared + i % Config::kStages * Config::kStageBytes, at.block, at.pass);
    advance(at);
  }
}

// The place of a lane in its warp and of the warp's part in a tile.
template <typename Config>
struct Lane {
  static constexpr Shape kShape = Config::kShape;
  int q, column, row;  // first of four columns; row of activations that it reads

  __device__ Lane() {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    q = lane % 4;
    column = warp % kShape.warps_n * kShape.units * 32 + lane / 4 * 4;
    row = warp / kShape.warps_n * kShape.slices * 8;
  }
  __device__ Place place(const TileOrigin& origin) const {
    return {origin.n + column, origin.m + row + 2 * q};
  }
  __device__ Stage<Config::kRowBytes> stage(const uint8_t* at) const {
    int g = threadIdx.x % kWarp / 4;
    return {at + column * 4, at + Config::kWeightBytes + (row + g) * kBlockBytes + q * 16};
  }
};

template <int kSlices, typename Stage>
__device__ inline void read_values(const Stage& stage, uint4 (&x)[kSlices]) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) x[s] = stage.values(s);
}

template <typename T, int kUnits, int kSlices>
__device__ inline void fill(T (&t)[kUnits][kSlices][2][4], T value) {
#pragma unroll
  for (auto& unit : t) {
    for (auto& slice : unit) {
      for (auto& half : slice) {
        for (T& x : half) x = value;
      }
    }
  }
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

template <typename Config, typename Engine>
__device__ inline void apply_group(const Gemm& p, const Place& at, int group, bool ends, int pass,
                                   bool counted, Engine& engine,
                                   float (&y)[Config::kShape.units][Config::kShape.slices][2][4]) {
  auto sum = [&](int u, int s, int half, int c) { return engine.t[u][s][half][c]; };
  Factors<Config::kShape.units, Config::kShape.slices> factors;
  if constexpr (Config::kMethod == Method::kFloat) {
    factors.template load_floats<Config::kBits>(p, at, group, ends && pass == 0);
    factors.add(y, sum);
    fill(engine.t, 0.0f);
  } else {
    if (p.integers) {
      int unit = act_unit(p.act_bits), zero = counted ? kCountedBits : 0;
      store_integers<Config::kBits, Config::kShape.units, Config::kShape.slices>(
          p, at, group, unit,
          [&](int u, int s, int half, int c) { return sum(u, s, half, c) - zero; });
    } else {
      factors.template load_codes<Config::kBits>(p, at, group, ends);
      if (counted) {
        factors.add(y, [&](int u, int s, int half, int c) {
          return __int_as_float(sum(u, s, half, c)) - kCountedFrom;
        });
      } else {
        factors.add(y, [&](int u, int s, int half, int c) {
          return static_cast<float>(sum(u, s, half, c));
        });
      }
    }
    fill(engine.t, counted ? kCountedBits : 0);
  }
}

// Products by codes or of floats, with scales applied at the end of each group.
template <typename Config, template <int, int, int> typename EngineOf>
__device__ inline void gemm_grouped(const Gemm& p, uint8_t* shared) {
  constexpr Shape kShape = Config::kShape;
  using Engine = EngineOf<Config::kBits, kShape.units, kShape.slices>;
  using Value = typename Engine::Value;
  TileOrigin origin = tile_origin<Config>(p);
  Lane<Config> lane;
  Place at = lane.place(origin);
  bool counted = Config::kMethod == Method::kCodes &&
                 int64_t{p.group_words} * kWordBits * 128 * max_level(Config::kBits) < 1 << 22;
  Engine engine;
  fill(engine.t, counted ? static_cast<Value>(kCountedBits) : Value{0});
  float y[kShape.units][kShape.slices][2][4];
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
          engine.multiply(lane.q, stage, x, i);
          int word = block * Config::kWords + i, group = word / p.group_words;
          bool ends = (word + 1) % p.group_words == 0 || word + 1 == p.words;
          if (word < p.words && (ends || word == last_word)) {
            apply_group<Config>(p, at, group, ends, pass, counted, engine, y);
          }
        }
      },
      [] {});
  if (p.integers) return;
  store<kShape.units, kShape.slices>(
      p, at, blockIdx.y, [&](int u, int s, int half, int c) { return y[u][s][half][c]; });
}

// Writes the result of a single group whose sums are sum(u, s, half, c).
template <typename Config, typename Sum>
__device__ inline void finish(const Gemm& p, const Place& at, int unit, const Sum& sum) {
  constexpr int kUnits = Config::kShape.units, kSlices = Config::kShape.slices;
  if constexpr (Config::kMethod != Method::kFloat) {
    if (p.integers) {
      store_integers<Config::kBits, kUnits, kSlices>(p, at, 0, unit, sum);
      return;
    }
  }
  Factors<kUnits, kSlices> factors;
  bool ends = last_block(p) == p.blocks;
  if constexpr (Config::kMethod == Method::kFloat) {
    factors.template load_floats<Config::kBits>(p, at, 0, ends);
  } else {
    factors.template load_codes<Config::kBits>(p, at, 0, ends);
  }
  store<kUnits, kSlices>(p, at, blockIdx.y, [&](int u, int s, int half, int c) {
    return factors.add_one(0.0f, u, s, half, c, static_cast<float>(sum(u, s, half, c)));
  });
}

// Products by codes or of floats with a single group: sums stay as they are to the end.
template <typename Config, template <int, int, int> typename EngineOf>
__device__ inline void gemm_whole(const Gemm& p, uint8_t* shared) {
  constexpr Shape kShape = Config::kShape;
  using Engine = EngineOf<Config::kBits, kShape.units, kShape.slices>;
  TileOrigin origin = tile_origin<Config>(p);
  Lane<Config> lane;
  Place at = lane.place(origin);
  Engine engine;
  fill(engine.t, typename Engine::Value{0});
  for_blocks<Config>(
      p, origin, shared, first_block(p), last_block(p),
      [&](const uint8_t* data, int, int) {
        auto stage = lane.stage(data);
        uint4 x[kShape.slices];
        read_values(stage, x);
#pragma unroll
        for (int i = 0; i < Config::kWords; ++i) engine.multiply(lane.q, stage, x, i);
      },
      [] {});
  finish<Config>(p, at, act_unit(p.act_bits),
                 [&](int u, int s, int half, int c) { return engine.t[u][s][half][c]; });
}

// Products by planes, whose weights have a single group.
template <typename Config>
__device__ inline void gemm_planes(const Gemm& p, uint8_t* shared) {
  constexpr Shape kShape = Config::kShape;
  TileOrigin origin = tile_origin<Config>(p);
  Lane<Config> lane;
  Place at = lane.place(origin);
  PlanesEngine<Config::kBits, kShape.units, kShape.slices> engine{};
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
  finish<Config>(p, at, 1, [&](int u, int s, int half, int c) {
    return engine.sum(u, s, half, c, centre);
  });
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

// The shapes of the output tiles that kernels are compiled for: host and device.
#pragma once

#include <algorithm>

#include "product.h"

namespace anyprec::cuda {

// kNarrow is for few rows of activations, kMedium for some, kWide for many. kWhole is wide too, but
// applies scales only once, so it has registers for a larger tile and is for a single weight group.
// kStream is for so few rows that reading the weights is all that takes time.
enum class Tile : int32_t { kNarrow, kMedium, kWide, kWhole, kStream };

// Whether results can be sums of integers, one for each group. Writing so many takes longer than
// computing them, so narrow tiles do where there are groups.
constexpr bool has_integers(Method method, Tile tile) {
  if (method == Method::kFloat) return false;
  return tile == Tile::kNarrow || tile == Tile::kWhole;
}

// A warp computes strips of 16 columns by slices of 8 rows, as instructions do; warps_n by warps_m of
// them are a block.
struct Shape {
  int strips, slices, warps_n, warps_m;

  constexpr int columns() const { return 16 * strips * warps_n; }
  constexpr int rows() const { return 8 * slices * warps_m; }
  constexpr int threads() const { return 32 * warps_n * warps_m; }
};

// Products by planes keep one set of accumulators for each plane of the weights, and those of
// kWhole fill the registers that 256 threads have.
constexpr Shape tile_shape(Method method, int weight_bits, Tile tile) {
  if (method == Method::kPlanes) {
    if (tile == Tile::kNarrow) return {2, weight_bits <= 4 ? 2 : 1, weight_bits <= 4 ? 4 : 2, 1};
    if (weight_bits == 1) return {4, 8, 4, 2};
    if (weight_bits == 2) return {2, 8, 4, 2};
    if (weight_bits <= 4) return {2, 4, 4, 2};
    return {2, 1, 2, 4};
  }
  switch (tile) {
    case Tile::kNarrow: return {2, 2, 4, 1};
    case Tile::kMedium: return {4, 4, 2, 2};
    case Tile::kWide: return {4, 4, 2, 4};
    case Tile::kWhole: return {4, 8, 4, 2};
    case Tile::kStream: break;  // below
  }
  return {};
}

// Rows of weights in shared memory are a word of each column, and 32 bytes further apart than they
// are long, so that the four lanes of a quad read from different banks.
constexpr int weight_row_bytes(Shape s) { return 4 * s.columns() + 32; }
constexpr int stage_bytes(Method method, int weight_bits, Shape s) {
  return weight_bits * block_words(method) * weight_row_bytes(s) + kBlockBytes * s.rows();
}

// What a block may use of the shared memory of every chip from compute capability 8.0 on.
constexpr int kSharedBytes = 99 * 1024;
constexpr int kMaxStages = 4;

constexpr int stage_count(Method method, int weight_bits, Shape s) {
  int fit = kSharedBytes / stage_bytes(method, weight_bits, s);
  return fit < kMaxStages ? fit : kMaxStages;
}
constexpr int shared_bytes(Method method, int weight_bits, Shape s) {
  return stage_count(method, weight_bits, s) * stage_bytes(method, weight_bits, s);
}

// --- products of few rows: a block has one or two tiles of weights, its warps a part of K each ---

constexpr int kStreamWarps = 8;
constexpr int kMostStreamRows = 16;
constexpr int kMostStreamStages = 8;

// Every block reads the activations of all rows, from the L2 cache. Two tiles to a block halve that
// where there is much of it.
constexpr int stream_tiles(int passes, int m) { return passes * m <= 8 ? 1 : 2; }

// Words of K in a stage of a warp: 0.5 to 2 KiB of weights, or one block of many activations.
constexpr int stream_words(Method method, int weight_bits, int tiles) {
  if (tiles > 1) return block_words(method);
  return weight_bits <= 2 ? 4 : 2;
}
constexpr int stream_row_bytes(int tiles) { return 4 * kTile * tiles + 32; }

// Bytes of activations in a stage of `blocks` blocks.
constexpr int stream_value_bytes(int blocks, int passes, int m) {
  return blocks * passes * m * kBlockBytes;
}

// Bytes of a stage of all warps.
constexpr int stream_stage_bytes(Method method, int weight_bits, int passes, int m,
                                 bool quantizes) {
  int tiles = stream_tiles(passes, m), words = stream_words(method, weight_bits, tiles);
  int values = quantizes ? 0 : stream_value_bytes(words / block_words(method), passes, m);
  return kStreamWarps * (weight_bits * words * stream_row_bytes(tiles) + values);
}

// Sums of a warp, for which those of all warps take the place of the stages at the end.
constexpr int stream_sums(int tiles) { return 32 * tiles * 8 * tiles; }

// Of shared memory: a row that the block quantizes itself, its pieces, scales and sums.
constexpr int64_t quantized_row_bytes(const Layout& layout, int64_t k, int64_t act_groups,
                                      int64_t groups) {
  return kBlockBytes * layout.blocks * layout.passes +
         4 * (std::max<int64_t>(1, words(k)) + act_groups + groups);
}

}  // namespace anyprec::cuda

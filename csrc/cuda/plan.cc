#include "plan.h"

#include <array>
#include <cstdint>
#include <stdexcept>

namespace anyprec::cuda {
namespace {

// Chips whose 1-bit tensor-core instruction is one in hardware, and not a routine of 130 others.
bool has_planes(int arch) { return arch >= 80 && arch < 100; }

// One-bit products (act_bits * weight_bits) up to which 1-bit tensor cores do more than 8-bit ones.
// From published rates: 8 times as many on compute capability 8.0, 7.4 times on 9.0, less the
// product by ones that counts the weights' bits. docs/gpu.md says what has been measured.
constexpr int kMaxPlaneProducts = 6;

// How near a tile comes to the rate of the instructions, relative to the largest: in proportion to
// products for each byte read from shared memory. Not measured yet.
double efficiency(Tile tile) {
  switch (tile) {
    case Tile::kNarrow: return 0.4;
    case Tile::kMedium: return 0.75;
    case Tile::kWide: return 0.85;
    case Tile::kWhole: return 1.0;
    case Tile::kStream: break;  // taken for few rows in any case
  }
  return 0;
}

// A part of a split product has at least so many blocks of K, so that copies run ahead for most of
// its time, and results are split in so many parts at most, because each is written and read.
constexpr int64_t kLeastSplitBlocks = 16, kMostSplits = 16;
// Products of few rows: blocks that a multiprocessor has at once, by their registers, and the part
// of the chip that must be busy, over all waves of blocks.
constexpr int64_t kStreamBlocks = 2;
constexpr double kBusy = 0.75;
// Stages that a warp has where not all blocks run at once: with fewer, little is under way.
constexpr int64_t kLeastWarpStages = 4;
// Up to so many rows weights should be read once, so all rows are in one tile.
constexpr int64_t kOneTileRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr std::array<const char*, 3> kMethods = {"planes", "codes", "float"};
constexpr std::array<const char*, 5> kTiles = {"narrow", "medium", "wide", "whole", "stream"};

int64_t group_count(int64_t k, int64_t group_size) { return k == 0 ? 1 : k / group_size; }

struct Tiling {
  Tile tile;
  int splits;
  double cost;
};

int tiles_of_block(Method method, const Problem& p) {
  return stream_tiles(pass_count(method, p), static_cast<int>(p.m));
}
int64_t stream_columns(Method method, const Problem& p) {
  return std::max<int64_t>(1, ceil_div(tiles(p.n), tiles_of_block(method, p)));
}

// The fewest parts of K, a power of two as clusters are, that keep the chip busy; otherwise those
// that come nearest. Warps have a stage at least.
int cluster_splits(int64_t columns, int64_t stages, int multiprocessors) {
  int64_t places = kStreamBlocks * multiprocessors;
  int best = 1;
  double best_share = 0;
  for (int splits = 1; splits <= kMostCluster; splits *= 2) {
    int64_t blocks = columns * splits;
    int64_t least = blocks <= places ? 1 : kLeastWarpStages;
    if (splits > 1 && stages < least * splits * kStreamWarps) break;
    double share = static_cast<double>(blocks) /
                   static_cast<double>(ceil_div(blocks, places) * places);
    if (share > best_share) best = splits, best_share = share;
    if (share >= kBusy) break;
  }
  return best;
}

// Parts of K for products of few rows. Those that a launch has to add are so many only that about
// every multiprocessor has a block.
int stream_splits(Method method, const Problem& p, const Device& device) {
  int64_t columns = stream_columns(method, p);
  int stage = stream_words(method, p.weight_bits, tiles_of_block(method, p));
  int64_t stages = ceil_div(words(p.k), stage);
  if (device.clusters) return cluster_splits(columns, stages, device.multiprocessors);
  int64_t splits = (device.multiprocessors + columns / 2) / columns;
  splits = std::min({splits, stages / kStreamWarps, kMostSplits});
  return static_cast<int>(std::max<int64_t>(1, splits));
}

// Who quantizes a single row; a comparison on a GPU may well move this. Blocks that run at once do
// it while their first weights are on the way. Where they come in several waves, each would do it
// again; a launch before does it once, at the same time as first weights are copied. Without
// dependent launches nothing runs at the same time, so blocks quantize in any case.
bool quantizes_row(Method method, const Problem& p, const Device& device, int splits) {
  if (!can_quantize(method, p)) return false;
  int64_t blocks = stream_columns(method, p) * splits;
  return !device.clusters || blocks <= kStreamBlocks * device.multiprocessors;
}

bool has_tile(Method method, const Problem& p, Tile tile) {
  int rows = tile_shape(method, p.weight_bits, tile).rows();
  if (method == Method::kPlanes) return tile == Tile::kNarrow || tile == Tile::kWhole;
  if (p.integers && !has_integers(method, tile)) return false;
  if (p.integers && p.group_size != p.k) return tile == Tile::kNarrow;
  if (p.m <= kOneTileRows && rows < p.m) return false;
  return tile != Tile::kWhole || p.group_size == p.k;
}

// Time in units of one product of a value: whole waves of blocks over the chip.
Tiling tiling(Method method, const Problem& p, Tile tile, int multiprocessors) {
  Shape shape = tile_shape(method, p.weight_bits, tile);
  int64_t tiles = ceil_div(p.m, shape.rows()) * ceil_div(p.n, shape.columns());
  int64_t blocks = layout_of(method, p).blocks, splits = 1;
  if (!p.integers && tiles > 0) {
    splits = std::min({multiprocessors / tiles, blocks / kLeastSplitBlocks, kMostSplits});
    splits = std::max<int64_t>(1, splits);
    splits = ceil_div(blocks, ceil_div(std::max<int64_t>(1, blocks), splits));
    splits = std::max<int64_t>(1, splits);
  }
  double waves = static_cast<double>(ceil_div(tiles * splits, multiprocessors));
  double work = static_cast<double>(shape.rows()) * shape.columns() / static_cast<double>(splits);
  return {tile, static_cast<int>(splits), waves * work / efficiency(tile)};
}

Tiling best_tiling(Method method, const Problem& p, int multiprocessors) {
  Tiling best{};
  for (Tile tile : {Tile::kWhole, Tile::kWide, Tile::kMedium, Tile::kNarrow}) {
    if (!has_tile(method, p, tile)) continue;
    Tiling candidate = tiling(method, p, tile, multiprocessors);
    if (best.cost == 0 || candidate.cost < best.cost) best = candidate;
  }
  return best;
}

std::string tile_text(Method method, int weight_bits, Tile tile) {
  Shape shape = tile_shape(method, weight_bits, tile);
  return "tiles of " + std::to_string(shape.rows()) + " x " + std::to_string(shape.columns());
}

std::string method_reason(Method method, const Problem& p, const std::string& not_planes) {
  if (method == Method::kFloat) return "float activations are multiplied as bfloat16";
  int products = p.act_bits * p.weight_bits;
  if (method == Method::kPlanes) {
    return std::to_string(products) + " one-bit products cost less than an 8-bit one";
  }
  return not_planes;
}

std::string splits_text(int splits) {
  return splits == 1 ? "" : ", K in " + std::to_string(splits) + " parts to fill the chip";
}

Plan stream_plan(Method method, const Problem& p, const Device& device, std::string reason) {
  int splits = stream_splits(method, p, device);
  bool clustered = device.clusters && splits > 1;
  bool quantizes = quantizes_row(method, p, device, splits);
  reason += "; weights streamed in tiles of " +
            std::to_string(kTile * tiles_of_block(method, p)) + splits_text(splits);
  if (clustered) reason += ", which a cluster of blocks adds";
  if (quantizes) reason += "; each block quantizes the row";
  return {method, Tile::kStream, splits, clustered, quantizes, reason};
}

}  // namespace

bool is_stream(Method method, const Problem& p) {
  return method != Method::kPlanes && !p.integers && p.m <= kMostStreamRows;
}

bool can_quantize(Method method, const Problem& p) {
  if (!is_stream(method, p) || p.m != 1 || p.k % kValues != 0) return false;
  int64_t row = quantized_row_bytes(layout_of(method, p), p.k, group_count(p.k, p.act_group_size),
                                    group_count(p.k, p.group_size));
  return row <= kSharedBytes / 3;  // the rest is for stages
}

int pass_count(Method method, const Problem& p) {
  if (method == Method::kPlanes) return p.act_bits;
  return method == Method::kFloat ? float_parts(p.x, p.rotated) : 1;
}

Layout layout_of(Method method, const Problem& p) {
  return make_layout(method, p.k, pass_count(method, p), group_count(p.k, p.act_group_size),
                     group_count(p.k, p.group_size));
}

std::string refusal(Method method, const Problem& p, int arch) {
  if (arch < 80) return "kernels need compute capability 8.0 or newer";
  if (words(p.k) > kMaxRowWords) return "rows are too long to be quantized in shared memory";
  if ((method == Method::kFloat) != (p.act_bits == 0)) {
    return method == Method::kFloat ? "it is for float activations" : "activations are floats";
  }
  if (method == Method::kFloat) return "";
  if (p.group_size > kMaxGroup) return "sums over a scale group may not fit int32";
  if (method == Method::kCodes) return "";
  if (!has_planes(arch)) return "the chip has no 1-bit tensor cores";
  if (p.group_size != p.k || p.act_group_size != p.k) {
    return "1-bit products need one scale for all of K";
  }
  return "";
}

Plan make_plan(const Problem& p, const Device& device, const std::string& asked) {
  Method method;
  std::string reason;
  if (!asked.empty()) {
    method = parse_method(asked);
    std::string why = refusal(method, p, device.arch);
    if (!why.empty()) throw std::invalid_argument("method " + asked + " can't be used: " + why);
    reason = "asked for by name";
  } else {
    int products = p.act_bits * p.weight_bits;
    std::string not_planes = refusal(Method::kPlanes, p, device.arch);
    if (not_planes.empty() && is_stream(Method::kCodes, p)) {
      not_planes = "for few rows all takes the time of reading the weights";
    }
    if (not_planes.empty() && products > kMaxPlaneProducts) {
      not_planes = std::to_string(products) + " one-bit products cost more than an 8-bit one";
    }
    method = p.act_bits == 0    ? Method::kFloat
             : not_planes.empty() ? Method::kPlanes
                                  : Method::kCodes;
    std::string why = refusal(method, p, device.arch);
    if (!why.empty()) throw std::invalid_argument(why);
    reason = method_reason(method, p, not_planes);
  }
  if (is_stream(method, p)) return stream_plan(method, p, device, reason);
  Tiling t = best_tiling(method, p, device.multiprocessors);
  reason += "; " + tile_text(method, p.weight_bits, t.tile) + splits_text(t.splits);
  return {method, t.tile, t.splits, false, false, reason};
}

Method parse_method(const std::string& name) {
  for (size_t i = 0; i < kMethods.size(); ++i) {
    if (name == kMethods[i]) return static_cast<Method>(i);
  }
  throw std::invalid_argument("method must be planes, codes or float, got " + name);
}
Tile parse_tile(const std::string& name) {
  for (size_t i = 0; i < kTiles.size(); ++i) {
    if (name == kTiles[i]) return static_cast<Tile>(i);
  }
  throw std::invalid_argument("tile must be narrow, medium, wide, whole or stream, got " + name);
}
const char* name_of(Method method) { return kMethods[static_cast<size_t>(method)]; }
const char* name_of(Tile tile) { return kTiles[static_cast<size_t>(tile)]; }

}  // namespace anyprec::cuda

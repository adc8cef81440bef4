// Which kernels the CUDA backend launches, in what grids and with what parameters, for all methods,
// bits and tiles and for sizes around those of tiles: host code alone, no GPU and no nvcc.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launch.h"

using namespace anyprec;
using namespace anyprec::cuda;

namespace {

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

template <typename F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

constexpr Device kA100{80, 108, false}, kH100{90, 132, true}, kB200{100, 148, true};

Problem problem(int64_t m, int64_t n, int64_t k, int act_bits, int weight_bits, int64_t group = 0) {
  if (group == 0) group = k;
  return {m, n, k, act_bits, weight_bits, group, k, DType::kF32, false, false};
}

std::string describe(const Problem& p, const Plan& plan) {
  return std::string(name_of(plan.method)) + " " + name_of(plan.tile) + " m=" + std::to_string(p.m) +
         " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k) + " group=" +
         std::to_string(p.group_size) + " a" + std::to_string(p.act_bits) + " w" +
         std::to_string(p.weight_bits) + " splits=" + std::to_string(plan.splits);
}

// Addresses only: nothing is read.
Buffers buffers() {
  Buffers b{};
  b.x = reinterpret_cast<const void*>(0x1000);
  b.tiles = reinterpret_cast<const uint32_t*>(0x2000);
  b.scales = reinterpret_cast<const void*>(0x3000);
  b.bias = reinterpret_cast<const void*>(0x4000);
  b.out = reinterpret_cast<void*>(0x5000);
  b.workspace = reinterpret_cast<uint8_t*>(0x6000);
  b.parts = reinterpret_cast<float*>(0x7000);
  return b;
}

template <typename Params>
Params params_of(const Launch& l, const std::string& what) {
  check(l.param_bytes == sizeof(Params), what + ": size of parameters");
  Params p;
  std::memcpy(&p, l.params, sizeof p);
  return p;
}

// An empty K has no end of a group that kernels with groups would wait for.
Tile tile_of(const Problem& p, const Plan& plan) { return p.k == 0 ? Tile::kWhole : plan.tile; }

// The name that a kernel has for what it does, so that the table can't be shifted by a line.
std::string gemm_name(const Problem& p, const Plan& plan) {
  return std::string("anyprec_") + name_of(plan.method) + "_w" + std::to_string(p.weight_bits) +
         "_" + name_of(tile_of(p, plan));
}

void check_gemm(const Problem& p, const Plan& plan, const Launch& l, const std::string& what) {
  Gemm g = params_of<Gemm>(l, what);
  Shape shape = tile_shape(plan.method, p.weight_bits, tile_of(p, plan));
  check(name_of(l.kernel) == gemm_name(p, plan), what + ": runs " + name_of(l.kernel));
  check(l.threads == static_cast<uint32_t>(shape.threads()) && l.threads <= 1024,
        what + ": threads");
  check(l.shared_bytes <= 99 * 1024, what + ": shared memory");
  int64_t across = p.n / shape.columns() + (p.n % shape.columns() != 0);
  int64_t down = p.m / shape.rows() + (p.m % shape.rows() != 0);
  check(l.grid[0] == across * down, what + ": grid covers M and N");
  // Each block of K belongs to exactly one of the parts, and no part is empty.
  check(static_cast<int>(l.grid[1]) == plan.splits && g.splits == plan.splits, what + ": splits");
  std::vector<int> owners(g.blocks);
  for (int z = 0; z < plan.splits; ++z) {
    int first = z * g.split_blocks, last = std::min(g.blocks, first + g.split_blocks);
    check(g.blocks == 0 || first < last, what + ": part " + std::to_string(z) + " is empty");
    for (int b = first; b < last; ++b) ++owners[b];
  }
  for (int b = 0; b < g.blocks; ++b) check(owners[b] == 1, what + ": block of K");
  int64_t covered = int64_t{g.blocks} * block_words(plan.method);
  check(covered >= words(p.k) && covered - block_words(plan.method) < words(p.k),
        what + ": blocks cover K");
  check(g.out == (plan.splits == 1 ? buffers().out : buffers().parts), what + ": where it writes");
}

void check_stream(const Problem& p, const Plan& plan, const Launch& l, const std::string& what) {
  Stream s = params_of<Stream>(l, what);
  int tiles_each = pass_count(plan.method, p) * p.m <= 8 ? 1 : 2;
  std::string name = std::string("anyprec_stream_") + name_of(plan.method) + "_w" +
                     std::to_string(p.weight_bits) + (tiles_each == 1 ? "_n32" : "_n64");
  check(name_of(l.kernel) == name, what + ": runs " + name_of(l.kernel));
  check(p.m <= kMostStreamRows && l.threads == 32 * kStreamWarps, what + ": rows and threads");
  check(l.shared_bytes <= 99 * 1024, what + ": shared memory");
  check(s.stages >= 2 && s.stages <= kMostStreamStages, what + ": stages");
  check((tiles(p.n) + tiles_each - 1) / tiles_each == l.grid[0] &&
            static_cast<int>(l.grid[1]) == plan.splits && s.gemm.splits == plan.splits,
        what + ": grid covers N and K");
  check(l.cluster == static_cast<uint32_t>(plan.clustered ? plan.splits : 1) &&
            s.clustered == plan.clustered && 8 % l.cluster == 0,
        what + ": clusters");
  check(s.quantizes == plan.quantizes && (!s.quantizes || p.m == 1), what + ": who quantizes");
  check(s.gemm.out == (plan.splits == 1 || plan.clustered ? buffers().out : buffers().parts),
        what + ": where it writes");
  // The sums of all warps take the place of the stages.
  int64_t sums = int64_t{kStreamWarps} * 32 * 4 * (tiles_each == 1 ? 8 : 32);
  check(sums <= l.shared_bytes, what + ": room for sums");
}

// A product of few rows hands what surrounds it to the launches that compute it, and to no other.
void check_fused(const Problem& p, const Plan& plan, const Device& device) {
  std::string what = describe(p, plan) + ", fused";
  Buffers b = buffers();
  b.before = Before::kRmsNorm;
  b.eps = 1e-5f;
  b.norm_scale = reinterpret_cast<const float*>(0x8000);
  b.residual = reinterpret_cast<const void*>(0x9000);
  b.residual_dtype = DType::kF16;
  std::vector<Launch> launches = matmul_launches(p, plan, device, b);
  size_t before = !plan.quantizes;
  Stream s = params_of<Stream>(launches[before], what);
  Prologue prologue = plan.quantizes ? s.prologue : params_of<Prologue>(launches[0], what);
  check(prologue.before == Before::kRmsNorm && prologue.eps == 1e-5f &&
            prologue.norm_scale == b.norm_scale,
        what + ": the norm");
  check(s.residual == b.residual && s.residual_dtype == DType::kF16, what + ": residual");
  if (launches.size() == before + 1) return;
  Reduce reduce = params_of<Reduce>(launches[before + 1], what);
  check(reduce.residual == b.residual && reduce.residual_dtype == DType::kF16,
        what + ": residual of a sum of parts");
}

void check_stream_launches(const Problem& p, const Plan& plan, const std::vector<Launch>& launches,
                           const std::string& what) {
  size_t before = !plan.quantizes, after = plan.splits > 1 && !plan.clustered;
  check(launches.size() == before + 1 + after, what + ": number of launches");
  check_stream(p, plan, launches[before], what);
  Stream s = params_of<Stream>(launches[before], what);
  check(s.prologue.before == Before::kNone && s.residual == nullptr, what + ": nothing is fused");
}

void check_launches(const Problem& p, const Plan& plan, const Device& device) {
  std::string what = describe(p, plan);
  std::vector<Launch> launches = matmul_launches(p, plan, device, buffers());
  for (size_t i = 0; i < launches.size(); ++i) {
    check(launches[i].dependent == (i > 0), what + ": only the first waits for all before");
  }
  if (p.m == 0 || p.n == 0) {
    check(launches.empty(), what + ": nothing to compute");
    return;
  }
  if (plan.tile == Tile::kStream) {
    check_stream_launches(p, plan, launches, what);
    return check_fused(p, plan, device);
  }
  check(launches.size() == (plan.splits == 1 ? 2u : 3u), what + ": number of launches");
  Prologue prologue = params_of<Prologue>(launches[0], what);
  check(launches[0].grid[0] == p.m && launches[0].threads <= 512, what + ": prologue's grid");
  check(launches[0].shared_bytes <= 48 * 1024, what + ": prologue's shared memory");
  Gemm gemm = params_of<Gemm>(launches[1], what);
  check(prologue.payload == gemm.payload && prologue.blocks == gemm.blocks &&
            (prologue.sums == gemm.act_sums || prologue.sums == nullptr),
        what + ": the product reads what the prologue writes");
  check_gemm(p, plan, launches[1], what);
  if (plan.splits == 1) return;
  Reduce reduce = params_of<Reduce>(launches[2], what);
  check(reduce.parts == buffers().parts && reduce.out == buffers().out &&
            reduce.count == p.m * p.n && reduce.splits == plan.splits,
        what + ": sum of parts");
  check(int64_t{launches[2].grid[0]} * launches[2].threads * 4 >= reduce.count,
        what + ": the sum covers the result");
}

void test_kernels() {
  std::set<std::string> names;
  for (int i = 0; i < static_cast<int>(Kernel::kCount); ++i) {
    names.insert(name_of(static_cast<Kernel>(i)));
  }
  check(names.size() == static_cast<size_t>(Kernel::kCount), "kernels have names of their own");
  for (Method method : {Method::kPlanes, Method::kCodes, Method::kFloat}) {
    for (int bits = 1; bits <= kMaxBits; ++bits) {
      for (Tile tile : {Tile::kNarrow, Tile::kMedium, Tile::kWide, Tile::kWhole}) {
        if (method == Method::kPlanes && (tile == Tile::kMedium || tile == Tile::kWide)) continue;
        Shape shape = tile_shape(method, bits, tile);
        std::string what = std::string(name_of(method)) + " " + name_of(tile);
        check(stage_count(method, bits, shape) >= 2, what + ": stages");
        check(shared_bytes(method, bits, shape) <= 99 * 1024, what + ": shared memory");
        check_launches(problem(5, 33, 256, method == Method::kFloat ? 0 : 2, bits),
                       {method, tile, 1, false, false, ""}, kH100);
      }
    }
  }
}

void test_sizes() {
  for (int act_bits : {0, 1, 2, 4, 8}) {
    for (int bits : {1, 2, 3, 8}) {
      for (int64_t k : {0, 1, 31, 64, 100, 512, 513, 4096, 65536}) {
        for (int64_t n : {0, 1, 32, 33, 257, 11008}) {
          for (int64_t m : {int64_t{0}, int64_t{1}, int64_t{9}, int64_t{129}, kManyRows}) {
            for (const Device& device : {kA100, kH100, kB200}) {
              Problem p = problem(m, n, k, act_bits, bits);
              Plan plan = make_plan(p, device, "");
              check(plan.splits >= 1 && plan.splits <= 16, describe(p, plan) + ": splits");
              check(!plan.reason.empty(), describe(p, plan) + ": has a reason");
              check(refusal(plan.method, p, device.arch).empty(), describe(p, plan) + ": refused");
              if (m != kManyRows) check_launches(p, plan, device);
            }
          }
        }
      }
    }
  }
}

void test_groups() {
  for (int act_bits : {0, 1, 4, 8}) {
    for (int64_t group : {32, 64, 96, 128}) {
      Problem p = problem(16, 4096, 384 * 12, act_bits, 2, group);
      for (int64_t act_group : {group, p.k}) {
        p.act_group_size = act_group;
        Plan plan = make_plan(p, kH100, "");
        check(plan.method != Method::kPlanes && plan.tile != Tile::kWhole,
              describe(p, plan) + ": no kernel has groups");
        check_launches(p, plan, kH100);
      }
    }
  }
}

// --- decode: a few rows, for which the weights are read once, at the rate of the chip's memory ---

struct Chip {
  const char* name;
  int arch, multiprocessors;
  double bytes_per_second;
  int shared_bytes;  // of a multiprocessor

  Device device() const { return {arch, multiprocessors, arch >= 90}; }
};

// NVIDIA's data sheets and whitepapers; shared memory from the CUDA C++ Programming Guide.
constexpr Chip kChips[] = {
    {"A100 40GB", 80, 108, 1.555e12, 164 << 10}, {"A100 80GB", 80, 108, 2.039e12, 164 << 10},
    {"RTX 3090", 86, 82, 0.936e12, 100 << 10},   {"RTX 4090", 89, 128, 1.008e12, 100 << 10},
    {"L40S", 89, 142, 0.864e12, 100 << 10},      {"H100", 90, 132, 3.35e12, 228 << 10},
    {"H200", 90, 132, 4.8e12, 228 << 10},        {"B200", 100, 148, 8.0e12, 228 << 10},
    {"RTX 5090", 120, 170, 1.792e12, 100 << 10},
};
// Microbenchmarks measure 500 to 600 cycles for a load from idle memory; from busy memory it is more.
constexpr double kLatency = 800e-9;

struct Decode {
  int64_t n, k;
};
constexpr Decode kDecode[] = {{4096, 4096},  {4096, 11008}, {11008, 4096}, {4096, 14336},
                              {14336, 4096}, {8192, 8192},  {8192, 28672}, {1024, 4096},
                              {1024, 8192}};

struct Flow {
  double blocks, under_way, needed, weights;  // of the chip; the latter three in bytes
  bool all;                                   // a block's are all under way at once

  // Copies that take the memory's time, or about all there are at once.
  bool keeps_busy(double slower) const {
    return all || slower * under_way >= std::min(needed, 0.8 * weights);
  }
};

// Weights that are under way while a product runs, from blocks that registers (2 of 256 threads) and
// shared memory let a multiprocessor have at once. Blocks go to idle multiprocessors first.
Flow flow_of(const Chip& chip, const Problem& p) {
  Plan plan = make_plan(p, chip.device(), "");
  std::string what = std::string(chip.name) + ": " + describe(p, plan);
  check(plan.tile == Tile::kStream, what + ": is streamed");
  std::vector<Launch> launches = matmul_launches(p, plan, chip.device(), buffers());
  const Launch& l = launches[plan.quantizes ? 0 : 1];
  Stream s = params_of<Stream>(l, what);
  int blocks_each = std::min(2, chip.shared_bytes / static_cast<int>(l.shared_bytes + 1024));
  check(blocks_each >= 1, what + ": a block fits");
  double blocks = static_cast<double>(l.grid[0]) * l.grid[1];
  int tiles_each = stream_tiles(s.gemm.passes, s.gemm.m);
  int stage_words = stream_words(plan.method, p.weight_bits, tiles_each);
  double of_warp = std::ceil(static_cast<double>(words(p.k)) / stage_words /
                             (plan.splits * kStreamWarps));
  double of_block = std::min<double>(s.stages - 1, of_warp) * kStreamWarps * stage_words * 4.0 *
                    kTile * tiles_each * p.weight_bits;
  Flow flow{};
  flow.blocks = blocks;
  flow.all = of_warp <= s.stages - 1;
  flow.under_way = std::min(blocks, 1.0 * blocks_each * chip.multiprocessors) * of_block;
  // Activations come from the L2 cache to every block. It gives twice what memory does at least;
  // where there is more of them than of weights, that is what limits the latter.
  double activations = plan.quantizes ? 0
                                      : double{kBlockBytes} * s.gemm.passes * s.gemm.m /
                                            block_words(plan.method) /
                                            (4 * kTile * tiles_each * p.weight_bits);
  flow.needed = chip.bytes_per_second * kLatency * std::min(1.0, 2 / (1 + activations));
  flow.weights = static_cast<double>(p.n) * static_cast<double>(p.k) * p.weight_bits / 8;
  check(activations <= 1 || p.weight_bits < 4, what + ": more activations than weights");
  return flow;
}

Problem decode_problem(const Decode& shape, int64_t m, bool floats, int weight_bits) {
  Problem p = problem(m, shape.n, shape.k, floats ? 0 : 8, weight_bits);
  p.x = DType::kBF16;
  return p;
}

void check_flow(const Chip& chip, const Problem& p, const Flow& flow) {
  std::string what = std::string(chip.name) + ": " + describe(p, make_plan(p, chip.device(), ""));
  // More rows may take 1.3 times as long as one; 16 of them at 8 TB/s twice as long, because 99 KiB
  // have no more than two stages of many bits.
  double slower = p.m == 1 ? 1 : p.m == 16 && chip.bytes_per_second > 5e12 ? 2 : 1.3;
  check(flow.keeps_busy(slower), what + ": too few bytes under way");
  // 1024 columns are 16 or 32 blocks, for clusters of 8 at most.
  double least = p.n == 1024 ? 0.3 : 0.75;
  check(flow.blocks >= least * chip.multiprocessors, what + ": too few blocks");
}

// With `table` prints for 1 to 8 bits: blocks for each multiprocessor, and bytes under way over
// those needed.
void test_decode(bool table) {
  for (const Chip& chip : kChips) {
    for (const Decode& shape : kDecode) {
      for (int i = 0; i < 6; ++i) {
        int64_t m = i < 2 ? 1 : i < 4 ? 8 : 16;
        bool floats = i % 2 == 1;
        std::string line = std::string(chip.name) + " n=" + std::to_string(shape.n) + " k=" +
                           std::to_string(shape.k) + " m=" + std::to_string(m) +
                           (floats ? " bf16:" : " int8:");
        for (int bits = 1; bits <= kMaxBits; ++bits) {
          Problem p = decode_problem(shape, m, floats, bits);
          Flow flow = flow_of(chip, p);
          check_flow(chip, p, flow);
          char cell[32];
          std::snprintf(cell, sizeof cell, " %.1f/%.1f", flow.blocks / chip.multiprocessors,
                        flow.under_way / flow.needed);
          line += cell;
        }
        if (table) std::printf("%s\n", line.c_str());
      }
    }
  }
}

void test_choice() {
  auto method = [](int act_bits, int bits, const Device& device) {
    return make_plan(problem(1024, 4096, 4096, act_bits, bits), device, "").method;
  };
  check(method(1, 1, kH100) == Method::kPlanes, "1 x 1 bits are planes");
  check(method(2, 2, kA100) == Method::kPlanes, "2 x 2 bits are planes");
  check(method(4, 4, kH100) == Method::kCodes, "4 x 4 bits are codes");
  check(method(1, 1, kB200) == Method::kCodes, "no planes without 1-bit tensor cores");
  check(method(0, 1, kH100) == Method::kFloat, "floats are floats");
  // A single row of a wide matrix leaves most of the chip idle, unless K is shared out.
  for (const Device& device : {kA100, kH100}) {
    Plan decode = make_plan(problem(1, 1024, 65536, 0, 4), device, "");
    check(decode.splits > 1, "few columns and a long K are split");
    check(decode.clustered == device.clusters, "parts are added in clusters where there are any");
  }
  // Blocks that come in several waves don't quantize, where a launch can run at the same time.
  Problem wide = problem(1, 28672, 8192, 8, 4);
  check(make_plan(problem(1, 8192, 8192, 8, 4), kH100, "").quantizes, "a wave of blocks quantizes");
  check(!make_plan(wide, kH100, "").quantizes, "a launch before several waves");
  check(make_plan(wide, kA100, "").quantizes, "no launch before where it would not run beside");
  // Up to 64 rows are one tile, so that weights are read once.
  for (int64_t m = kMostStreamRows + 1; m <= 64; ++m) {
    for (int act_bits : {0, 8}) {
      for (int64_t n : {1024, 4096, 8192, 28672}) {
        Problem p = problem(m, n, 8192, act_bits, 4, m % 2 ? 64 : 0);
        p.x = DType::kBF16;
        Plan plan = make_plan(p, kH100, "");
        Shape tile = tile_shape(plan.method, 4, plan.tile);
        check(tile.rows() >= m, describe(p, plan) + ": weights are read more than once");
        check(plan.splits * ((n + tile.columns() - 1) / tile.columns()) >= 0.4 * 132,
              describe(p, plan) + ": few blocks");
      }
    }
  }
  Problem integers = problem(1, 1024, 65536, 8, 4);
  integers.integers = true;
  integers.x = DType::kU8;
  check(make_plan(integers, kH100, "").splits == 1, "integers are not split");
  for (int64_t m : {1, 16, 17, 64, 65, 4096}) {
    for (int64_t group : {32, 4096}) {
      Problem p = problem(m, 4096, 4096, 8, 4, group);
      p.integers = true;
      p.x = DType::kU8;
      Plan plan = make_plan(p, kH100, "");
      check(has_integers(plan.method, plan.tile), describe(p, plan) + ": no integers");
      check(m < 4096 || (plan.tile == Tile::kWhole) == (group == 4096), describe(p, plan) + ": tile");
    }
  }
}

void test_refusals() {
  Problem p = problem(4, 64, 256, 2, 2);
  check(refusal(Method::kPlanes, p, 90).empty(), "planes run on 9.0");
  check(contains(refusal(Method::kPlanes, p, 120), "no 1-bit tensor cores"), "planes on 12.0");
  check(contains(refusal(Method::kCodes, p, 75), "8.0 or newer"), "an old chip");
  check(contains(refusal(Method::kFloat, p, 90), "float activations"), "codes given to floats");
  check(contains(refusal(Method::kCodes, problem(4, 64, 256, 0, 2), 90), "floats"),
        "floats given to codes");
  check(contains(refusal(Method::kPlanes, problem(4, 64, 256, 2, 2, 64), 90), "one scale"),
        "planes with groups");
  check(contains(refusal(Method::kCodes, problem(4, 64, 1 << 17, 2, 2), 90), "int32"),
        "a group too long");
  check(contains(refusal(Method::kFloat, problem(4, 64, 1 << 20, 0, 2), 90), "too long"),
        "a row too long");
  check(contains(error_of([&] { make_plan(p, kB200, "planes"); }), "planes can't be used"),
        "asked for planes on 10.0");
  check(contains(error_of([&] { make_plan(p, {75, 40, false}, ""); }), "8.0"), "no method on 7.5");
  check(contains(error_of([] { parse_method("fast"); }), "got fast"), "name of a method");
  check(contains(error_of([] { parse_tile("huge"); }), "got huge"), "name of a tile");
  check(contains(error_of([] { parse_before("relu"); }), "got relu"), "name of what comes before");
  Plan plan{Method::kCodes, Tile::kNarrow, 1, false, false, ""};
  check(contains(error_of([&] {
          matmul_launches(problem(1, int64_t{1} << 32, 64, 2, 2), plan, kH100, buffers());
        }), "2^31"), "N too large");
  check(contains(error_of([&] {
          matmul_launches(problem(1, int64_t{1} << 30, 4096, 2, 8), plan, kH100, buffers());
        }), "64 GiB"), "weights too large");
  Buffers gated = buffers(), added = buffers();
  gated.before = Before::kSwiGlu;
  added.residual = added.x;
  for (const Buffers& b : {gated, added}) {
    check(contains(error_of([&] { matmul_launches(p, plan, kH100, b); }), "only tile stream"),
          "a fused product in other tiles");
  }
}

void test_quantize() {
  auto launches = [](int64_t m) {
    return quantize_launches(problem(m, 0, 320, 4, 1, 32), buffers().x, nullptr, 0,
                             buffers().workspace, buffers().parts);
  };
  check(launches(0).empty(), "no rows to quantize");
  check(launches(7).size() == 1, "quantize is one launch");
  Prologue p = params_of<Prologue>(launches(7)[0], "quantize");
  check(p.payload == buffers().workspace && p.scales == buffers().parts && p.sums == nullptr &&
            p.m == 7 && p.k == 320 && p.bits == 4 && p.before == Before::kNone,
        "quantize writes codes and scales, and no sums");
}

}  // namespace

// With the argument "table", prints what test_decode() finds.
int main(int count, char** arguments) {
  test_kernels();
  test_sizes();
  test_groups();
  test_choice();
  test_decode(count > 1 && std::string(arguments[1]) == "table");
  test_refusals();
  test_quantize();
  std::printf("%d checks passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

#include "launch.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace anyprec::cuda {
namespace {

#define ANYPREC_KERNEL_NAME(name, ...) #name,
constexpr const char* kNames[] = {ANYPREC_KERNELS(ANYPREC_KERNEL_NAME)};

struct GemmKernel {
  Method method;
  int bits;
  Tile tile;
};
#define ANYPREC_GEMM_LINE(name, method, bits, tile) {Method::method, bits, Tile::tile},
constexpr GemmKernel kGemms[] = {ANYPREC_GEMMS(ANYPREC_GEMM_LINE)};

struct StreamKernel {
  Method method;
  int bits, tiles;
};
#define ANYPREC_STREAM_LINE(name, method, bits, tiles) {Method::method, bits, tiles},
constexpr StreamKernel kStreams[] = {ANYPREC_STREAMS(ANYPREC_STREAM_LINE)};

// What a prologue makes, as `Output` of prologue.cuh.
enum class Output { kPlanes, kCodes, kFloat, kPlain };
struct PrologueKernel {
  Output output;
  bool given;
};
#define ANYPREC_PROLOGUE_LINE(name, output, given) {Output::output, given},
constexpr PrologueKernel kPrologues[] = {ANYPREC_PROLOGUES(ANYPREC_PROLOGUE_LINE)};

// Kernels are listed products first, then those of few rows, prologues, and the sum of parts.
constexpr int kFirstStream = std::size(kGemms);
constexpr int kFirstPrologue = kFirstStream + std::size(kStreams);

Kernel gemm_kernel(Method method, int bits, Tile tile) {
  for (size_t i = 0; i < std::size(kGemms); ++i) {
    const GemmKernel& g = kGemms[i];
    if (g.method == method && g.bits == bits && g.tile == tile) return static_cast<Kernel>(i);
  }
  throw std::invalid_argument(std::string("there is no kernel for method ") + name_of(method) +
                              ", tile " + name_of(tile));
}

Kernel stream_kernel(Method method, int bits, int tiles) {
  for (size_t i = 0; i < std::size(kStreams); ++i) {
    const StreamKernel& s = kStreams[i];
    if (s.method == method && s.bits == bits && s.tiles == tiles) {
      return static_cast<Kernel>(kFirstStream + i);
    }
  }
  throw std::invalid_argument(std::string("there is no kernel for few rows by ") + name_of(method));
}

Kernel prologue_kernel(Output output, bool given) {
  for (size_t i = 0; i < std::size(kPrologues); ++i) {
    if (kPrologues[i].output == output && kPrologues[i].given == given) {
      return static_cast<Kernel>(kFirstPrologue + i);
    }
  }
  throw std::invalid_argument("codes are for products by planes or codes");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t group_count(int64_t k, int64_t group_size) { return k == 0 ? 1 : k / group_size; }

// Words of a scale group; one that is all of K ends with it, and may end within a word.
int32_t group_words(int64_t group_size) {
  return static_cast<int32_t>(std::max<int64_t>(1, words(group_size)));
}

template <typename Params>
Launch make_launch(Kernel kernel, int64_t grid_x, int64_t grid_y, int threads, int64_t shared,
                   const Params& params) {
  static_assert(sizeof(Params) <= sizeof(Launch::params) && std::is_trivially_copyable_v<Params>);
  if (grid_x > INT32_MAX || grid_y > 65535) throw std::invalid_argument("the product is too large");
  Launch l{kernel,
           {static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y)},
           static_cast<uint32_t>(threads),
           static_cast<uint32_t>(shared),
           1,
           false,
           sizeof(Params),
           {}};
  std::memcpy(l.params, &params, sizeof(Params));
  return l;
}

constexpr const char* kBefore[] = {"none", "rms_norm", "swiglu"};

constexpr int kChunk = 1024;  // values of a warp of a prologue
constexpr int kMostWarps = 16;

// The parts of a prologue's parameters that a problem determines.
void fill_prologue(const Problem& p, int bits, int64_t block, Prologue& params) {
  params.dtype = p.x;
  params.m = static_cast<int32_t>(p.m);
  params.k = static_cast<int32_t>(p.k);
  params.bits = bits;
  params.block = static_cast<int32_t>(block);
  params.norm = block == 0 ? 1.0f : static_cast<float>(1 / std::sqrt(static_cast<double>(block)));
  params.act_groups = static_cast<int32_t>(group_count(p.k, p.act_group_size));
  params.act_group_words = group_words(p.act_group_size);
  params.groups = static_cast<int32_t>(group_count(p.k, p.group_size));
  params.group_words = group_words(p.group_size);
}

Launch prologue_launch(const Problem& p, Output output, const Prologue& params) {
  int64_t warps = std::min<int64_t>(kMostWarps, std::max<int64_t>(1, ceil_div(p.k, kChunk)));
  return make_launch(prologue_kernel(output, p.x == DType::kU8), p.m, 1,
                     static_cast<int>(32 * warps), 4 * std::max<int64_t>(1, words(p.k)), params);
}

Launch gemm_launch(const Problem& p, const Plan& plan, const Gemm& gemm) {
  // Where K is 0 no group ever ends; kernels of whole tiles write their only one all the same.
  Tile tile = p.k == 0 ? Tile::kWhole : plan.tile;
  Shape shape = tile_shape(plan.method, p.weight_bits, tile);
  int64_t grid = ceil_div(p.n, shape.columns()) * ceil_div(p.m, shape.rows());
  return make_launch(gemm_kernel(plan.method, p.weight_bits, tile), grid, plan.splits,
                     shape.threads(), shared_bytes(plan.method, p.weight_bits, shape), gemm);
}

// Shared memory of a multiprocessor (CUDA C++ Programming Guide, table of compute capabilities), of
// which each block takes 1 KiB more than it asks for.
int64_t multiprocessor_bytes(int arch) {
  if (arch == 80 || arch == 87) return 164 * 1024;
  if (arch >= 90 && arch < 120) return 228 * 1024;
  return 100 * 1024;
}

// Stages of each warp: as many as leave room for a second block on the multiprocessor, if there is
// one and both together have more copies under way than one block with all it can get.
int stream_stages(int64_t stage, int64_t row, int64_t blocks, const Device& device) {
  int64_t half = std::min<int64_t>(kSharedBytes, multiprocessor_bytes(device.arch) / 2 - 1024);
  int64_t stages = (kSharedBytes - row) / stage, shared = (half - row) / stage;
  if (blocks > device.multiprocessors && 2 * (shared - 1) >= stages - 1) stages = shared;
  return static_cast<int>(std::min<int64_t>(stages, kMostStreamStages));
}

Launch stream_launch(const Problem& p, const Plan& plan, const Device& device, const Gemm& gemm,
                     const Prologue& prologue, const Buffers& b) {
  int m = static_cast<int>(p.m), tiles_of_block = stream_tiles(gemm.passes, m);
  int64_t stage = stream_stage_bytes(plan.method, p.weight_bits, gemm.passes, m, plan.quantizes);
  int64_t row = !plan.quantizes ? 0
                                : quantized_row_bytes(layout_of(plan.method, p), p.k,
                                                      gemm.act_groups, gemm.groups);
  int64_t columns = ceil_div(tiles(p.n), tiles_of_block);
  int stages = stream_stages(stage, row, columns * plan.splits, device);
  int64_t sums = 4 * kStreamWarps * stream_sums(tiles_of_block);
  auto quantize_at = static_cast<int32_t>(stages * stage);
  Stream params{gemm,           prologue,       b.residual,  b.residual_dtype,
                plan.quantizes, plan.clustered, quantize_at, stages};
  Launch launch = make_launch(stream_kernel(plan.method, p.weight_bits, tiles_of_block),
                              columns, plan.splits, 32 * kStreamWarps,
                              std::max(stages * stage + row, sums), params);
  if (plan.clustered) launch.cluster = plan.splits;
  return launch;
}

Launch reduce_launch(const Problem& p, const Plan& plan, const Buffers& b) {
  Reduce reduce{b.parts,      b.bias,           b.residual,  b.out,
                b.bias_dtype, b.residual_dtype, b.out_dtype, plan.splits,
                static_cast<int32_t>(p.n), p.m * p.n};
  return make_launch(Kernel::anyprec_reduce, ceil_div(reduce.count, 4 * kReduceThreads), 1,
                     kReduceThreads, 0, reduce);
}

void check_sizes(const Problem& p) {
  if (p.m > INT32_MAX || p.n > INT32_MAX || p.k > INT32_MAX) {
    throw std::invalid_argument("sizes must be below 2^31");
  }
  // Kernels count pieces of 16 bytes in 32 bits.
  int64_t weights = tiles(p.n) * kTile * words(p.k) * p.weight_bits / 4;
  int64_t rows = p.m * layout_of(Method::kPlanes, p).row_bytes / 16;
  if (weights > UINT32_MAX || rows > UINT32_MAX) {
    throw std::invalid_argument("operands must be below 64 GiB");
  }
}

}  // namespace

Before parse_before(const std::string& name) {
  for (size_t i = 0; i < std::size(kBefore); ++i) {
    if (name == kBefore[i]) return static_cast<Before>(i);
  }
  throw std::invalid_argument("before must be none, rms_norm or swiglu, got " + name);
}

const char* name_of(Kernel kernel) { return kNames[static_cast<int>(kernel)]; }

std::vector<Launch> quantize_launches(const Problem& p, const void* x, const uint32_t* signs,
                                      int64_t block, uint8_t* codes, float* scales) {
  if (p.m == 0) return {};
  Prologue params{};
  params.x = x;
  params.signs = signs;
  params.payload = codes;
  params.scales = scales;
  fill_prologue(p, p.act_bits, block, params);
  return {prologue_launch(p, Output::kPlain, params)};
}

std::vector<Launch> matmul_launches(const Problem& p, const Plan& plan, const Device& device,
                                    const Buffers& b) {
  check_sizes(p);
  bool fused = b.before != Before::kNone || b.residual != nullptr;
  if (fused && plan.tile != Tile::kStream) {
    throw std::invalid_argument("only tile stream has products with a norm, a gate or a residual");
  }
  if (p.m == 0 || p.n == 0) return {};
  Layout layout = layout_of(plan.method, p);
  Prologue prologue{};
  prologue.x = b.x;
  prologue.signs = b.signs;
  prologue.peaks = b.peaks;
  prologue.norm_scale = b.norm_scale;
  prologue.before = b.before;
  prologue.eps = b.eps;
  prologue.payload = b.workspace;
  prologue.scales = reinterpret_cast<float*>(b.workspace + p.m * layout.scales);
  prologue.blocks = static_cast<int32_t>(layout.blocks);
  // Sums of floats are for offsets only.
  bool sums = plan.method != Method::kFloat || b.offsets != nullptr;
  prologue.sums = sums ? b.workspace + p.m * layout.sums : nullptr;
  auto output = static_cast<Output>(plan.method);
  int bits = plan.method == Method::kFloat ? static_cast<int>(layout.passes) : p.act_bits;
  fill_prologue(p, bits, b.block, prologue);

  Gemm gemm{};
  gemm.weights = b.tiles;
  gemm.scales = b.scales;
  gemm.offsets = b.offsets;
  gemm.bias = b.bias;
  gemm.payload = b.workspace;
  gemm.act_scales = prologue.scales;
  gemm.act_sums = b.workspace + p.m * layout.sums;
  bool in_parts = plan.splits > 1 && !plan.clustered;
  gemm.out = in_parts ? b.parts : b.out;
  gemm.scale_dtype = b.scale_dtype;
  gemm.offset_dtype = b.offset_dtype;
  gemm.bias_dtype = b.bias_dtype;
  gemm.out_dtype = b.out_dtype;
  gemm.m = static_cast<int32_t>(p.m);
  gemm.n = static_cast<int32_t>(p.n);
  gemm.words = static_cast<int32_t>(words(p.k));
  gemm.blocks = static_cast<int32_t>(layout.blocks);
  gemm.passes = static_cast<int32_t>(layout.passes);
  gemm.split_blocks = static_cast<int32_t>(ceil_div(layout.blocks, plan.splits));
  gemm.splits = plan.splits;
  gemm.groups = static_cast<int32_t>(group_count(p.k, p.group_size));
  gemm.group_words = group_words(p.group_size);
  gemm.act_groups = static_cast<int32_t>(group_count(p.k, p.act_group_size));
  gemm.act_bits = p.act_bits;
  gemm.integers = p.integers;

  std::vector<Launch> launches;
  if (!plan.quantizes) launches.push_back(prologue_launch(p, output, prologue));
  launches.push_back(plan.tile == Tile::kStream ? stream_launch(p, plan, device, gemm, prologue, b)
                                                : gemm_launch(p, plan, gemm));
  if (in_parts) launches.push_back(reduce_launch(p, plan, b));
  for (size_t i = 1; i < launches.size(); ++i) launches[i].dependent = true;
  return launches;
}

}  // namespace anyprec::cuda

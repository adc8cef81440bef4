// XLA custom calls of the CUDA backend: check the buffers, then launch kernels on XLA's stream.
#include "cuda_handlers.h"

#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "../cuda/launch.h"
#include "../cuda/run.h"
#include "checks.h"

namespace anyprec::cuda {
namespace {

// Hadamard blocks that a warp of the prologue transforms.
constexpr int64_t kLeastBlock = 64, kMostBlock = 1024;
constexpr int kMostSplits = 16;

void expect(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

bool is_group_size(int64_t group_size, int64_t k) {
  if (k == 0 || group_size == k) return true;
  return group_size > 0 && group_size % kWordBits == 0 && k % group_size == 0;
}

}  // namespace

void check_problem(const Problem& p) {
  expect(p.m >= 0 && p.n >= 0 && p.k >= 0, "sizes must not be negative");
  expect(p.act_bits >= 0 && p.act_bits <= kMaxBits, "activation bits must be 0 (float) to 8");
  expect(p.weight_bits >= 1 && p.weight_bits <= kMaxBits, "weight bits must be 1 to 8");
  expect(is_group_size(p.group_size, p.k),
         "group size must be k, or a multiple of 32 that divides it");
  expect(p.k == 0 || p.act_group_size == p.group_size || p.act_group_size == p.k,
         "activation groups must be the weights' or one a token");
  expect(p.integers == (p.x == DType::kU8), "integer products take codes, and only they do");
  expect(!p.integers || p.act_bits > 0, "integer products need 1 to 8 activation bits");
}

void check_plan(const Problem& p, const Plan& plan) {
  expect(plan.tile != Tile::kWhole || p.k == 0 || p.group_size == p.k,
         "tile whole needs one scale for all of K");
  expect(!p.integers || has_integers(plan.method, plan.tile),
         "integer products are for tiles narrow and whole");
  expect(plan.tile != Tile::kStream || is_stream(plan.method, p),
         "tile stream is for at most 16 rows, by codes or floats");
  expect(!plan.quantizes || (plan.tile == Tile::kStream && can_quantize(plan.method, p)),
         "only in tile stream can blocks quantize, a single row that fits");
  expect(plan.splits >= 1 && plan.splits <= kMostSplits, "splits must be 1 to 16");
  bool cluster = plan.tile == Tile::kStream && plan.splits > 1 && plan.splits <= kMostCluster &&
                 std::has_single_bit(static_cast<unsigned>(plan.splits));
  expect(!plan.clustered || cluster, "clusters are 2, 4 or 8 splits in tile stream");
  if (plan.splits == 1) return;
  expect(!p.integers, "integer products can't be split");
  if (plan.tile == Tile::kStream) return;  // their parts may be empty
  int64_t blocks = layout_of(plan.method, p).blocks;
  int64_t each = (blocks + plan.splits - 1) / plan.splits;
  expect((plan.splits - 1) * each < blocks, "there are more splits than parts of K");
}

namespace {

struct Size {
  int64_t m, k;
};

Size read_matrix(const ffi::AnyBuffer& x) {
  require(x.dimensions().size() == 2, "activations must have two axes");
  return {x.dimensions()[0], x.dimensions()[1]};
}

// Activations of m rows of k, and tiles of N columns, which must have the shape that follows.
Problem read_problem(int64_t m, int64_t k, DType dtype, const ffi::AnyBuffer& weights, int64_t n,
                     int64_t act_bits, int64_t group_size, int64_t act_group_size, bool rotated) {
  auto dims = weights.dimensions();
  require(weights.element_type() == ffi::DataType::U32 && dims.size() == 4,
          "weights must be uint32 tiles with four axes");
  require(act_bits >= 0 && act_bits <= kMaxBits, "activation bits out of range");
  require(dims[2] >= 1 && dims[2] <= kMaxBits, "weight bits out of range");
  Problem p{};
  p.m = m;
  p.n = n;
  p.k = k;
  p.act_bits = static_cast<int>(act_bits);
  p.weight_bits = static_cast<int>(dims[2]);
  p.group_size = group_size;
  p.act_group_size = act_group_size;
  p.x = dtype;
  p.rotated = rotated;
  p.integers = dtype == DType::kU8;
  check_problem(p);
  require(has_shape(weights, {tiles(n), words(p.k), p.weight_bits, kTile}),
          "weights do not match k and the result");
  return p;
}

// A program may come from a machine with another chip, so the plan in it is checked on this one.
Plan read_plan(const Problem& p, std::string_view method, std::string_view tile, int64_t splits,
               bool clustered, bool quantizes, const Device& device) {
  require(splits >= 1 && splits <= kMostSplits, "splits must be 1 to 16");
  Plan plan{parse_method(std::string(method)), parse_tile(std::string(tile)),
            static_cast<int>(splits), clustered, quantizes, ""};
  int arch = device.arch;
  std::string why = refusal(plan.method, p, arch);
  if (!why.empty()) {
    throw std::invalid_argument("this program's method " + std::string(method) +
                                " can't run on compute capability " + std::to_string(arch / 10) +
                                "." + std::to_string(arch % 10) + ": " + why);
  }
  check_plan(p, plan);
  if (clustered && !device.clusters) {
    throw std::invalid_argument(
        "this program splits K over clusters of blocks, for which a GPU must have compute "
        "capability 9.0 or newer, and the kernels be compiled for that: compile the program for this "
        "GPU");
  }
  return plan;
}

const uint32_t* read_signs(const ffi::AnyBuffer& signs, int64_t block, int64_t k) {
  require(block == 0 || (block >= kLeastBlock && block <= kMostBlock),
          "rotation block must be 64 to 1024");
  return read_rotation(signs, block, k);
}

// An absent operand has the shape [0].
bool absent(const ffi::AnyBuffer& b) { return has_shape(b, {0}); }

const void* read_groups(const ffi::AnyBuffer& b, const Problem& p, const char* what) {
  require(has_shape(b, {tiles(p.n), group_count(p.k, p.group_size), kTile}), what);
  return b.untyped_data();
}

// The workspace must have exactly the layout of the method.
uint8_t* read_workspace(ffi::AnyBuffer& b, const Problem& p, Method method) {
  require(b.element_type() == ffi::DataType::U8 &&
              has_shape(b, {p.m, layout_of(method, p).row_bytes}),
          "workspace has a wrong type or shape");
  return static_cast<uint8_t*>(b.untyped_data());
}

float* read_parts(ffi::AnyBuffer& b, const Problem& p, const Plan& plan) {
  bool absent = plan.splits == 1 || plan.clustered;
  require(b.element_type() == ffi::DataType::F32 &&
              has_shape(b, {absent ? 0 : plan.splits, p.m, p.n}),
          "parts must be float32[splits, M, N], or [0, M, N] for one or a cluster");
  return absent ? nullptr : static_cast<float*>(b.untyped_data());
}

ffi::Error quantize(CUstream_st* stream, ffi::AnyBuffer x, ffi::AnyBuffer signs,
                    ffi::Result<ffi::AnyBuffer> codes, ffi::Result<ffi::AnyBuffer> scales,
                    int64_t act_bits, int64_t block) {
  return guarded([&] {
    require(x.dimensions().size() == 2, "x must have two axes");
    require(scales->dimensions().size() == 2 && scales->dimensions()[1] > 0,
            "scales must have at least one group");
    require(act_bits >= 1 && act_bits <= kMaxBits, "activation bits out of range");
    int64_t groups = scales->dimensions()[1];
    Problem p{};
    p.m = x.dimensions()[0];
    p.k = x.dimensions()[1];
    require(p.k % groups == 0, "scale groups must divide k");
    p.act_bits = static_cast<int>(act_bits);
    p.act_group_size = p.k / groups;
    require(is_group_size(p.act_group_size, p.k),
            "group size must be k, or a multiple of 32 that divides it");
    p.group_size = kWordBits;  // there are no weights, and no sums for them
    p.x = float_type<DType>(x.element_type());
    p.rotated = block != 0;
    const uint32_t* sign_words = read_signs(signs, block, p.k);
    require(codes->element_type() == ffi::DataType::U8 && has_shape(*codes, {p.m, p.k}) &&
                scales->element_type() == ffi::DataType::F32 && has_shape(*scales, {p.m, groups}),
            "results have a wrong type or shape");
    std::string why = refusal(Method::kCodes, p, current_device().arch);
    if (!why.empty()) throw std::invalid_argument(why);
    run(quantize_launches(p, x.untyped_data(), sign_words, block,
                          static_cast<uint8_t*>(codes->untyped_data()),
                          static_cast<float*>(scales->untyped_data())),
        stream);
  });
}

ffi::Error int_matmul(CUstream_st* stream, ffi::AnyBuffer codes, ffi::AnyBuffer weights,
                      ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                      int64_t act_bits, int64_t group_size, std::string_view method,
                      std::string_view tile) {
  return guarded([&] {
    require(codes.element_type() == ffi::DataType::U8, "codes must be uint8");
    require(out->dimensions().size() == 3, "result must have three axes");
    auto [m, k] = read_matrix(codes);
    Problem p = read_problem(m, k, DType::kU8, weights, out->dimensions()[1], act_bits, group_size,
                             group_size, false);
    require(out->element_type() == ffi::DataType::S32 &&
                has_shape(*out, {p.m, p.n, group_count(p.k, group_size)}),
            "result must be int32[M, N, groups]");
    Device device = current_device();
    Plan plan = read_plan(p, method, tile, 1, false, false, device);
    Buffers b{};
    b.x = codes.untyped_data();
    b.tiles = static_cast<const uint32_t*>(weights.untyped_data());
    b.out = out->untyped_data();
    b.workspace = read_workspace(*workspace, p, plan.method);
    run(matmul_launches(p, plan, device, b), stream);
  });
}

// What all products of floats have, but for their scratch memory.
Buffers read_buffers(const Problem& p, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weights,
                     const ffi::AnyBuffer& scales, const ffi::AnyBuffer& offsets,
                     const ffi::AnyBuffer& bias, const ffi::AnyBuffer& signs, int64_t block,
                     ffi::AnyBuffer& out) {
  Buffers b{};
  b.x = x.untyped_data();
  b.tiles = static_cast<const uint32_t*>(weights.untyped_data());
  b.scales = read_groups(scales, p, "scales do not match the weights");
  b.scale_dtype = float_type<DType>(scales.element_type());
  if (!absent(offsets)) {
    b.offsets = read_groups(offsets, p, "offsets do not match the weights");
    b.offset_dtype = float_type<DType>(offsets.element_type());
  }
  if (!absent(bias)) {
    require(has_shape(bias, {p.n}), "bias must be [N]");
    b.bias = bias.untyped_data();
    b.bias_dtype = float_type<DType>(bias.element_type());
  }
  b.signs = read_signs(signs, block, p.k);
  b.block = block;
  require(has_shape(out, {p.m, p.n}), "result must be [M, N]");
  b.out = out.untyped_data();
  b.out_dtype = float_type<DType>(out.element_type());
  return b;
}

const float* read_peaks(const ffi::AnyBuffer& peaks, const Problem& p) {
  if (absent(peaks)) return nullptr;
  require(peaks.element_type() == ffi::DataType::F32 && has_shape(peaks, {p.m}) &&
              p.act_group_size == p.k && p.act_bits > 0,
          "peaks must be float32[M], for one scale a token");
  return static_cast<const float*>(peaks.untyped_data());
}

ffi::Error matmul(CUstream_st* stream, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                  ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::AnyBuffer bias,
                  ffi::AnyBuffer signs, ffi::AnyBuffer peaks, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> workspace, ffi::Result<ffi::AnyBuffer> parts,
                  int64_t act_bits, int64_t group_size, int64_t act_group_size, int64_t block,
                  std::string_view method, std::string_view tile, int64_t splits, bool clustered,
                  bool quantizes) {
  return guarded([&] {
    require(out->dimensions().size() == 2, "result must have two axes");
    auto [m, k] = read_matrix(x);
    Problem p = read_problem(m, k, float_type<DType>(x.element_type()), weights,
                             out->dimensions()[1], act_bits, group_size, act_group_size,
                             block != 0);
    Buffers b = read_buffers(p, x, weights, scales, offsets, bias, signs, block, *out);
    b.peaks = read_peaks(peaks, p);
    Device device = current_device();
    Plan plan = read_plan(p, method, tile, splits, clustered, quantizes, device);
    b.workspace = read_workspace(*workspace, p, plan.method);
    b.parts = read_parts(*parts, p, plan);
    run(matmul_launches(p, plan, device, b), stream);
  });
}

void read_norm(const ffi::AnyBuffer& scale, float eps, const Problem& p, Buffers& b) {
  require(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative");
  if (b.before != Before::kRmsNorm) {
    require(absent(scale), "the scale of a norm must be [0] where there is none");
    return;
  }
  require(scale.element_type() == ffi::DataType::F32 && has_shape(scale, {p.k}),
          "the scale of a norm must be float32[K]");
  b.norm_scale = static_cast<const float*>(scale.untyped_data());
  b.eps = eps;
}

void read_residual(const ffi::AnyBuffer& residual, const Problem& p, Buffers& b) {
  if (absent(residual)) return;
  require(has_shape(residual, {p.m, p.n}), "residual must be [M, N]");
  b.residual = residual.untyped_data();
  b.residual_dtype = float_type<DType>(residual.element_type());
}

ffi::Error fused_matmul(CUstream_st* stream, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                        ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::AnyBuffer bias,
                        ffi::AnyBuffer signs, ffi::AnyBuffer norm_scale, ffi::AnyBuffer residual,
                        ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                        ffi::Result<ffi::AnyBuffer> parts, int64_t act_bits, int64_t group_size,
                        int64_t act_group_size, int64_t block, std::string_view method,
                        std::string_view tile, int64_t splits, bool clustered, bool quantizes,
                        std::string_view before, float eps) {
  return guarded([&] {
    require(out->dimensions().size() == 2, "result must have two axes");
    auto [m, k] = read_matrix(x);
    Before first = parse_before(std::string(before));
    require(first != Before::kSwiGlu || k % 2 == 0, "x must be [M, 2 K] for swiglu");
    if (first == Before::kSwiGlu) k /= 2;
    Problem p = read_problem(m, k, float_type<DType>(x.element_type()), weights,
                             out->dimensions()[1], act_bits, group_size, act_group_size,
                             block != 0);
    Buffers b = read_buffers(p, x, weights, scales, offsets, bias, signs, block, *out);
    b.before = first;
    read_norm(norm_scale, eps, p, b);
    read_residual(residual, p, b);
    Device device = current_device();
    Plan plan = read_plan(p, method, tile, splits, clustered, quantizes, device);
    b.workspace = read_workspace(*workspace, p, plan.method);
    b.parts = read_parts(*parts, p, plan);
    run(matmul_launches(p, plan, device, b), stream);
  });
}

// A product after its operands: results, and attributes that say what it is and its plan.
template <typename Binding>
auto as_planned(Binding&& operands) {
  return std::move(operands)
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("act_bits")
      .template Attr<int64_t>("group_size")
      .template Attr<int64_t>("act_group_size")
      .template Attr<int64_t>("block")
      .template Attr<std::string_view>("method")
      .template Attr<std::string_view>("tile")
      .template Attr<int64_t>("splits")
      .template Attr<bool>("clustered")
      .template Attr<bool>("quantizes");
}

}  // namespace

// They can be captured in command buffers (CUDA graphs): see run().
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaQuantizeHandler, quantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CUstream_st*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("act_bits")
                                  .Attr<int64_t>("block"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaIntMatmulHandler, int_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CUstream_st*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("act_bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("method")
                                  .Attr<std::string_view>("tile"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaMatmulHandler, matmul,
                              as_planned(ffi::Ffi::Bind()
                                             .Ctx<ffi::PlatformStream<CUstream_st*>>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaFusedMatmulHandler, fused_matmul,
                              as_planned(ffi::Ffi::Bind()
                                             .Ctx<ffi::PlatformStream<CUstream_st*>>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>()
                                             .Arg<ffi::AnyBuffer>())
                                  .Attr<std::string_view>("before")
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace anyprec::cuda

// XLA custom calls of the CPU backend: check the buffers, then run the kernels on XLA's threads.
#include "cpu_handlers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "checks.h"

namespace anyprec::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels(std::getenv("JAX_ANYPREC_ISA"));
  return chosen;
}

Method parse_method(std::string_view name) {
  if (name == "float") return Method::kFloat;
  if (name == "codes") return Method::kCodes;
  if (name == "planes") return Method::kPlanes;
  throw std::invalid_argument("method must be float, codes or planes, got " + std::string(name));
}

namespace {

// One task should outlast the cost of handing it to another thread by far.
constexpr int64_t kTaskValues = 1 << 14;
// Products of one task at least and (if it is more than one block) at most, and those of a matrix
// that several threads share at least.
constexpr int64_t kLeastProducts = 1 << 16, kMostProducts = 1 << 20, kSharedProducts = 1 << 18;
constexpr int64_t kTasksPerThread = 2;
// A loop over fewer products is brief: waking threads for the next would cost about as much.
constexpr int64_t kBriefProducts = 1 << 26;

// For the helpers of brief loops of all products of this process, whose pools are the same few
// threads of XLA. Never destroyed: a helper may wait in it while the process ends.
WaitingRoom& waiting_room() {
  static WaitingRoom& room = *new WaitingRoom;
  return room;
}

Activations read_activations(const ffi::AnyBuffer& x, int64_t bits, int64_t group_size,
                             int64_t block, const ffi::AnyBuffer& signs) {
  require(x.dimensions().size() == 2, "x must have two axes");
  require(bits >= 0 && bits <= kMaxBits, "activation bits out of range");
  int64_t k = x.dimensions()[1];
  group_count(k, group_size);
  return {x.untyped_data(), float_type<DType>(x.element_type()), x.dimensions()[0], k,
          static_cast<int>(bits), group_size, block, read_rotation(signs, block, k), nullptr};
}

// Planes [bits][N][words], or tiles [tiles(N)][words][bits][kTile] of a prepared tensor.
Matrix read_planes(const ffi::AnyBuffer& planes, int64_t n, int64_t k) {
  auto dims = planes.dimensions();
  require(planes.element_type() == ffi::DataType::U32 && (dims.size() == 3 || dims.size() == 4),
          "planes must be uint32 with three axes, or four in tiles");
  Matrix w{};
  w.prepared = dims.size() == 4;
  w.bits = static_cast<int>(w.prepared ? dims[2] : dims[0]);
  w.n = n;
  require(w.bits >= 1 && w.bits <= kMaxBits, "weight bits out of range");
  require(w.prepared ? has_shape(planes, {tiles(n), words(k), w.bits, kTile})
                     : has_shape(planes, {w.bits, n, words(k)}),
          "planes do not match k and the result");
  w.planes = static_cast<const uint32_t*>(planes.untyped_data());
  return w;
}

void check_groups(const ffi::AnyBuffer& x, const Matrix& w, const char* what) {
  require(w.prepared ? has_shape(x, {tiles(w.n), w.groups, kTile}) : has_shape(x, {w.n, w.groups}),
          what);
}

// The workspace must have exactly the layout that workspace_row_bytes() told.
void set_workspace(Product& p, std::vector<Segment>& segments, int64_t weight_group,
                   ffi::AnyBuffer& workspace) {
  int64_t k = p.act.k;
  segments.resize(segment_count(k, weight_group));
  make_segments(k, weight_group, segments.data());
  p.segments = segments.data();
  p.segment_count = static_cast<int64_t>(segments.size());
  int64_t act_groups = group_count(k, p.act.group_size);
  p.row = row_layout(k, p.segment_count, act_groups, p.act.bits, p.method);
  require(has_shape(workspace, {p.act.m, p.row.parts * p.row.bytes}),
          "workspace has a wrong shape");
  p.workspace = static_cast<uint8_t*>(workspace.untyped_data());
}

// Memory for one thread's task, aligned for vectors and not cleared.
std::unique_ptr<uint8_t, decltype(&std::free)> make_scratch(int64_t bytes) {
  size_t size = static_cast<size_t>(bytes + 63) / 64 * 64;
  auto* memory = static_cast<uint8_t*>(size == 0 ? nullptr : std::aligned_alloc(64, size));
  if (size != 0 && memory == nullptr) throw std::bad_alloc();
  return {memory, &std::free};
}

template <typename Body>
void parallel_rows(ffi::ThreadPool& pool, int64_t m, int64_t k, const Body& body) {
  int64_t step = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, k));
  parallel_for((m + step - 1) / step, pool.num_threads(), nullptr,
               [&](auto fn) { pool.Schedule(std::move(fn)); },
               [&](int64_t task) {
                 auto scratch = make_scratch(prologue_bytes(k));
                 int64_t end = std::min(m, (task + 1) * step);
                 for (int64_t i = task * step; i < end; ++i) body(i, scratch.get());
               });
}

// run(block, m0, m1, scratch) over all blocks of columns and of rows.
template <typename Run>
void parallel_blocks(ffi::ThreadPool& pool, const Product& p, const Run& run) {
  int64_t columns = kernels().columns;
  int64_t threads = pool.num_threads();
  int64_t blocks = (p.w.n + columns - 1) / columns;
  int64_t row_blocks = (p.act.m + kMaxRows - 1) / kMaxRows;
  int64_t k = std::max<int64_t>(1, p.act.k), all = p.act.m * p.w.n * k;
  int64_t products = columns * std::clamp<int64_t>(p.act.m, 1, kMaxRows) * k;
  int64_t step = std::min(blocks / (kTasksPerThread * threads), kMostProducts / products);
  step = std::max<int64_t>({1, step, kLeastProducts / products});
  if (all < kSharedProducts) step = std::max<int64_t>(1, blocks);
  int64_t tasks = (blocks + step - 1) / step;
  parallel_for(tasks * row_blocks, threads, all < kBriefProducts ? &waiting_room() : nullptr,
               [&](auto fn) { pool.Schedule(std::move(fn)); },
               [&](int64_t task) {
                 auto scratch = make_scratch(block_bytes(p));
                 int64_t m0 = task / tasks * kMaxRows;
                 int64_t m1 = std::min<int64_t>(p.act.m, m0 + kMaxRows);
                 int64_t first = task % tasks * step;
                 for (int64_t b = first; b < std::min(blocks, first + step); ++b) {
                   run(b, m0, m1, scratch.get());
                 }
               });
}

ffi::Error quantize(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer signs,
                    ffi::Result<ffi::AnyBuffer> codes, ffi::Result<ffi::AnyBuffer> scales,
                    int64_t act_bits, int64_t block) {
  return guarded([&] {
    require(scales->dimensions().size() == 2 && scales->dimensions()[1] > 0,
            "scales must have at least one group");
    require(x.dimensions().size() == 2, "x must have two axes");
    int64_t groups = scales->dimensions()[1], k = x.dimensions()[1];
    require(k % groups == 0, "scale groups must divide k");
    Activations a = read_activations(x, act_bits, k / groups, block, signs);
    require(a.bits > 0, "activation bits out of range");
    require(codes->element_type() == ffi::DataType::U8 && has_shape(*codes, {a.m, a.k}) &&
                scales->element_type() == ffi::DataType::F32 && has_shape(*scales, {a.m, groups}),
            "results have a wrong type or shape");
    auto* code_rows = static_cast<uint8_t*>(codes->untyped_data());
    auto* scale_rows = static_cast<float*>(scales->untyped_data());
    parallel_rows(pool, a.m, a.k, [&](int64_t m, uint8_t* scratch) {
      kernels().quantize(a, m, scratch, code_rows + m * a.k, scale_rows + m * groups);
    });
  });
}

ffi::Error int_matmul(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer planes,
                      ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                      int64_t act_bits, int64_t group_size, std::string_view method) {
  return guarded([&] {
    require(codes.element_type() == ffi::DataType::U8 && codes.dimensions().size() == 2,
            "codes must be uint8 with two axes");
    Product p{};
    p.method = parse_method(method);
    require(p.method != Method::kFloat && act_bits >= 1 && act_bits <= kMaxBits,
            "integer products need 1 to 8 activation bits");
    p.act.m = codes.dimensions()[0];
    p.act.k = codes.dimensions()[1];
    p.act.bits = static_cast<int>(act_bits);
    p.act.group_size = group_size;
    require(out->dimensions().size() == 3, "result must have three axes");
    p.w = read_planes(planes, out->dimensions()[1], p.act.k);
    p.w.groups = group_count(p.act.k, group_size);
    require(out->element_type() == ffi::DataType::S32 &&
                has_shape(*out, {p.act.m, p.w.n, p.w.groups}),
            "result must be int32[M, N, groups]");
    p.out = out->untyped_data();
    std::vector<Segment> segments;
    set_workspace(p, segments, group_size, *workspace);
    std::memset(p.out, 0, out->size_bytes());
    const auto* rows = static_cast<const uint8_t*>(codes.untyped_data());
    uint8_t mask = static_cast<uint8_t>(max_level(p.act.bits));
    parallel_rows(pool, p.act.m, p.act.k, [&](int64_t m, uint8_t* codes) {
      for (int64_t i = 0; i < p.act.k; ++i) codes[i] = rows[m * p.act.k + i] & mask;
      kernels().prologue_codes(p, m, codes);
    });
    parallel_blocks(pool, p, [&](int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
      kernels().int_product(p, block, m0, m1, scratch);
    });
  });
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer planes,
                  ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::AnyBuffer bias,
                  ffi::AnyBuffer signs, ffi::AnyBuffer peaks, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> workspace, int64_t act_bits, int64_t group_size,
                  int64_t act_group_size, int64_t block, std::string_view method) {
  return guarded([&] {
    Product p{};
    p.method = parse_method(method);
    p.act = read_activations(x, act_bits, act_group_size, block, signs);
    require((p.act.bits == 0) == (p.method == Method::kFloat), "method does not fit the bits");
    require(act_group_size == group_size || act_group_size == p.act.k,
            "activation groups must be the weights' or one a token");
    // Absent peaks have no elements, and so have those of no rows.
    if (peaks.element_count() > 0) {
      require(peaks.element_type() == ffi::DataType::F32 && has_shape(peaks, {p.act.m}) &&
                  act_group_size == p.act.k && p.act.bits > 0,
              "peaks must be float32[M], for one scale a token");
      p.act.peaks = static_cast<const float*>(peaks.untyped_data());
    }
    require(out->dimensions().size() == 2, "result must have two axes");
    p.w = read_planes(planes, out->dimensions()[1], p.act.k);
    p.w.groups = group_count(p.act.k, group_size);
    check_groups(scales, p.w, "scales do not match the planes");
    p.w.scales = scales.untyped_data();
    p.w.scale_dtype = float_type<DType>(scales.element_type());
    if (offsets.dimensions().size() > 1) {
      check_groups(offsets, p.w, "offsets do not match the planes");
      p.w.offsets = offsets.untyped_data();
      p.w.offset_dtype = float_type<DType>(offsets.element_type());
    }
    // An absent bias has no elements, and so has the bias of an empty result.
    if (bias.element_count() > 0) {
      require(has_shape(bias, {p.w.n}), "bias must be [N]");
      p.bias = bias.untyped_data();
      p.bias_dtype = float_type<DType>(bias.element_type());
    }
    require(has_shape(*out, {p.act.m, p.w.n}), "result must be [M, N]");
    p.out = out->untyped_data();
    p.out_dtype = float_type<DType>(out->element_type());
    std::vector<Segment> segments;
    set_workspace(p, segments, group_size, *workspace);
    parallel_rows(pool, p.act.m, p.act.k,
                  [&](int64_t m, uint8_t* scratch) { kernels().prologue(p, m, scratch); });
    parallel_blocks(pool, p, [&](int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
      kernels().product(p, block, m0, m1, scratch);
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeHandler, quantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("act_bits")
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(IntMatmulHandler, int_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("act_bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("method"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulHandler, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("act_bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("act_group_size")
                                  .Attr<int64_t>("block")
                                  .Attr<std::string_view>("method"));

}  // namespace anyprec::cpu

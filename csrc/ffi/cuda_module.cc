// The Python module _cuda: handlers as capsules, devices, and plans and launches as plain values.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../cuda/launch.h"
#include "../cuda/run.h"
#include "cuda_handlers.h"

namespace py = pybind11;
using namespace anyprec;
using namespace anyprec::cuda;

namespace {

py::dict registrations() {
  auto capsule = [](XLA_FFI_Handler* handler) {
    return py::capsule(reinterpret_cast<void*>(handler));
  };
  py::dict handlers;
  handlers["jax_anyprec_cuda_quantize"] = capsule(CudaQuantizeHandler);
  handlers["jax_anyprec_cuda_int_matmul"] = capsule(CudaIntMatmulHandler);
  handlers["jax_anyprec_cuda_matmul"] = capsule(CudaMatmulHandler);
  handlers["jax_anyprec_cuda_fused_matmul"] = capsule(CudaFusedMatmulHandler);
  return handlers;
}

py::list devices() {
  py::list all;
  for (const DeviceInfo& d : find_devices().found) {
    py::dict one;
    one["name"] = d.name;
    one["arch"] = d.arch;
    one["multiprocessors"] = d.multiprocessors;
    all.append(one);
  }
  return all;
}

std::optional<std::string> device_error() {
  Devices devices = find_devices();
  return devices.found.empty() ? std::optional(devices.error) : std::nullopt;
}

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "float16") return DType::kF16;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "uint8") return DType::kU8;
  throw std::invalid_argument("dtype must be float32, float16, bfloat16 or uint8, got " + name);
}

Problem make_problem(std::optional<int64_t> rows, int64_t n, int64_t k, int act_bits,
                     int weight_bits, int64_t group_size, int64_t act_group_size,
                     const std::string& x_dtype, bool rotated, bool integers) {
  Problem p{rows.value_or(kManyRows), n, k, act_bits, weight_bits, group_size,
            integers ? group_size : act_group_size, parse_dtype(x_dtype), rotated, integers};
  check_problem(p);
  return p;
}

py::dict plan(std::optional<int64_t> rows, int64_t n, int64_t k, int act_bits, int weight_bits,
              int64_t group_size, int64_t act_group_size, const std::string& x_dtype, bool rotated,
              bool integers, int arch, int multiprocessors, bool clusters,
              const std::string& method) {
  if (multiprocessors < 1) throw std::invalid_argument("multiprocessors must be positive");
  Problem p = make_problem(rows, n, k, act_bits, weight_bits, group_size, act_group_size, x_dtype,
                           rotated, integers);
  Plan made = make_plan(p, {arch, multiprocessors, clusters}, method);
  py::dict result;
  result["method"] = name_of(made.method);
  result["tile"] = name_of(made.tile);
  result["splits"] = made.splits;
  result["clustered"] = made.clustered;
  result["quantizes"] = made.quantizes;
  result["reason"] = made.reason;
  result["workspace_row_bytes"] = layout_of(made.method, p).row_bytes;
  return result;
}

template <typename T>
T pointer(uint64_t address) {
  return reinterpret_cast<T>(static_cast<uintptr_t>(address));
}

py::list to_python(const std::vector<Launch>& launches) {
  py::list all;
  for (const Launch& l : launches) {
    py::dict one;
    one["kernel"] = name_of(l.kernel);
    one["grid"] = py::make_tuple(l.grid[0], l.grid[1]);
    one["threads"] = l.threads;
    one["shared"] = l.shared_bytes;
    one["cluster"] = py::make_tuple(1, l.cluster);
    one["dependent"] = l.dependent;
    one["params"] = py::bytes(reinterpret_cast<const char*>(l.params), l.param_bytes);
    all.append(one);
  }
  return all;
}

py::list launches(int64_t rows, int64_t n, int64_t k, int act_bits, int weight_bits,
                  int64_t group_size, int64_t act_group_size, const std::string& x_dtype,
                  bool rotated, bool integers, const std::string& method, const std::string& tile,
                  int splits, bool clustered, bool quantizes, int arch, int multiprocessors,
                  int64_t block, uint64_t x, uint64_t tiles, uint64_t scales, uint64_t offsets,
                  uint64_t bias, uint64_t signs, uint64_t peaks, uint64_t out, uint64_t workspace,
                  uint64_t parts, const std::string& scale_dtype,
                  const std::string& offset_dtype, const std::string& bias_dtype,
                  const std::string& out_dtype, const std::string& before, float eps,
                  uint64_t norm_scale, uint64_t residual, const std::string& residual_dtype) {
  Problem p = make_problem(rows, n, k, act_bits, weight_bits, group_size, act_group_size, x_dtype,
                           rotated, integers);
  Plan plan{parse_method(method), parse_tile(tile), splits, clustered, quantizes, ""};
  check_plan(p, plan);
  Buffers b{};
  b.x = pointer<const void*>(x);
  b.tiles = pointer<const uint32_t*>(tiles);
  b.scales = pointer<const void*>(scales);
  b.offsets = pointer<const void*>(offsets);
  b.bias = pointer<const void*>(bias);
  b.signs = pointer<const uint32_t*>(signs);
  b.peaks = pointer<const float*>(peaks);
  b.out = pointer<void*>(out);
  b.workspace = pointer<uint8_t*>(workspace);
  b.parts = pointer<float*>(parts);
  b.scale_dtype = parse_dtype(scale_dtype);
  b.offset_dtype = parse_dtype(offset_dtype);
  b.bias_dtype = parse_dtype(bias_dtype);
  b.out_dtype = parse_dtype(out_dtype);
  b.block = block;
  b.before = parse_before(before);
  b.eps = eps;
  b.norm_scale = pointer<const float*>(norm_scale);
  b.residual = pointer<const void*>(residual);
  b.residual_dtype = parse_dtype(residual_dtype);
  return to_python(matmul_launches(p, plan, {arch, multiprocessors, clustered}, b));
}

py::list quantize_calls(int64_t rows, int64_t k, int act_bits, int64_t act_group_size,
                        const std::string& x_dtype, int64_t block, uint64_t x, uint64_t signs,
                        uint64_t codes, uint64_t scales) {
  Problem p = make_problem(rows, 0, k, act_bits, 1, act_group_size, act_group_size, x_dtype,
                           block != 0, false);
  return to_python(quantize_launches(p, pointer<const void*>(x), pointer<const uint32_t*>(signs),
                                     block, pointer<uint8_t*>(codes), pointer<float*>(scales)));
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::string text = ANYPREC_CUDA_ARCHITECTURES;
  for (size_t first = 0; first < text.size();) {
    size_t end = std::min(text.find(' ', first), text.size());
    names.push_back(text.substr(first, end - first));
    first = end + 1;
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of jax_anyprec as XLA custom calls.";
  m.def("registrations", &registrations, "Custom-call names to handler capsules.");
  m.def(
      "ffi_api_version", [] { return std::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "XLA FFI API (major, minor) of the headers that this was built with.");
  m.def("architectures", &architectures,
        "What kernels are compiled for, as CMake names it: 90a-real is code for compute capability "
        "9.0, 120-virtual is PTX, which newer chips compile.");
  m.def("devices", &devices, "Name, arch (90 for 9.0) and multiprocessors of each device here.");
  m.def("device_error", &device_error, "Why devices() is empty, or None.");
  m.def("plan", &plan, py::kw_only(), py::arg("rows"), py::arg("n"), py::arg("k"),
        py::arg("act_bits"), py::arg("weight_bits"), py::arg("group_size"),
        py::arg("act_group_size"), py::arg("x_dtype"), py::arg("rotated"), py::arg("integers"),
        py::arg("arch"), py::arg("multiprocessors"), py::arg("clusters"), py::arg("method") = "",
        "Method, tile, splits, clustered, quantizes, reason and workspace_row_bytes of a product. "
        "Rows may be None, for unknown; 0 act_bits are floats. Clusters says whether the chip runs "
        "kernels that have them. ValueError with the reason if no method, or not the one "
        "asked for, can compute it on such a chip.");
  m.def("launches", &launches, py::kw_only(), py::arg("rows"), py::arg("n"), py::arg("k"),
        py::arg("act_bits"), py::arg("weight_bits"), py::arg("group_size"),
        py::arg("act_group_size"), py::arg("x_dtype"), py::arg("rotated"), py::arg("integers"),
        py::arg("method"), py::arg("tile"), py::arg("splits"), py::arg("clustered"),
        py::arg("quantizes"), py::arg("arch"), py::arg("multiprocessors"), py::arg("block"),
        py::arg("x"), py::arg("tiles"), py::arg("scales"), py::arg("offsets"), py::arg("bias"),
        py::arg("signs"), py::arg("peaks"), py::arg("out"), py::arg("workspace"),
        py::arg("parts"), py::arg("scale_dtype"), py::arg("offset_dtype"), py::arg("bias_dtype"),
        py::arg("out_dtype"), py::arg("before") = "none", py::arg("eps") = 0.0f,
        py::arg("norm_scale") = 0, py::arg("residual") = 0, py::arg("residual_dtype") = "float32",
        "What a product launches, without launching it: kernel, grid, threads, shared (bytes), "
        "cluster, dependent and params (bytes) of each. Operands are addresses, 0 if absent.");
  m.def("quantize_launches", &quantize_calls, py::kw_only(), py::arg("rows"), py::arg("k"),
        py::arg("act_bits"), py::arg("act_group_size"), py::arg("x_dtype"), py::arg("block"),
        py::arg("x"), py::arg("signs"), py::arg("codes"), py::arg("scales"),
        "What quantizing activations launches, as launches() tells it.");
  m.attr("WORD_BITS") = kWordBits;
  m.attr("MAX_BITS") = kMaxBits;
  m.attr("TILE") = kTile;
}

// The Python module _cpu: handlers as capsules, and the facts that the Python side asks for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "cpu_handlers.h"

namespace py = pybind11;
using namespace anyprec;

namespace {

py::capsule capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict registrations() {
  py::dict handlers;
  handlers["jax_anyprec_cpu_quantize"] = capsule(cpu::QuantizeHandler);
  handlers["jax_anyprec_cpu_int_matmul"] = capsule(cpu::IntMatmulHandler);
  handlers["jax_anyprec_cpu_matmul"] = capsule(cpu::MatmulHandler);
  return handlers;
}

int64_t workspace_row_bytes(int64_t k, int64_t group_size, int64_t act_group_size, int act_bits,
                            const std::string& method) {
  int64_t act_groups = k == 0 ? 1 : k / act_group_size;
  cpu::RowLayout row = cpu::row_layout(k, cpu::segment_count(k, group_size), act_groups, act_bits,
                                       cpu::parse_method(method));
  return row.parts * row.bytes;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.push_back(k->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of jax_anyprec as XLA custom calls.";
  cpu::kernels();  // a wrong JAX_ANYPREC_ISA fails the import, with its reason
  m.def("registrations", &registrations, "Custom-call names to handler capsules.");
  m.def(
      "ffi_api_version", [] { return std::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "XLA FFI API (major, minor) of the headers that this was built with.");
  m.def("isa", [] { return cpu::kernels().name; }, "The instruction set in use.");
  m.def("available_isas", &available_isas, "Those usable here, the best first.");
  m.def("workspace_row_bytes", &workspace_row_bytes, py::arg("k"), py::arg("group_size"),
        py::arg("act_group_size"), py::arg("act_bits"), py::arg("method"),
        "Scratch bytes that a product needs for each row of activations.");
  m.attr("WORD_BITS") = kWordBits;
  m.attr("MAX_BITS") = kMaxBits;
  m.attr("TILE") = kTile;
  m.attr("ZERO_BITS") = kZeroBits;
  m.attr("MIN_SCALE") = kMinScale;
  m.attr("MAX_SCALE") = kMaxScale;
  m.attr("ZERO_LEVEL") = kZeroLevel;
}

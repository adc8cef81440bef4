// The CPU backend's XLA handlers and what Python needs to call them.
#pragma once

#include <string_view>

#include "../cpu/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace anyprec::cpu {

// The kernels that all handlers run, chosen on first use; JAX_ANYPREC_ISA forces one.
const Kernels& kernels();

// Throws std::invalid_argument unless `name` is float, codes or planes.
Method parse_method(std::string_view name);

XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(IntMatmulHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MatmulHandler);

}  // namespace anyprec::cpu

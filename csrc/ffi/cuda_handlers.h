// The CUDA backend's XLA handlers, and the checks that its Python module shares with them.
#pragma once

#include "../cuda/plan.h"
#include "xla/ffi/api/ffi.h"

namespace anyprec::cuda {

// Throw std::invalid_argument unless a problem is one, and unless a plan computes it on some chip.
void check_problem(const Problem& problem);
void check_plan(const Problem& problem, const Plan& plan);

XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaQuantizeHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaIntMatmulHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaMatmulHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaFusedMatmulHandler);

}  // namespace anyprec::cuda

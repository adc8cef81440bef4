// The kernels of products of few rows.
#include "kernels.h"
#include "stream.cuh"

#define ANYPREC_DEFINE_STREAM(name, method, bits, slices)                                       \
  extern "C" __global__ void __launch_bounds__(32 * anyprec::cuda::kStreamWarps, 2)             \
      name(const __grid_constant__ anyprec::cuda::Stream p) {                                   \
    using namespace anyprec::cuda;                                                              \
    if constexpr (Method::method == Method::kCodes) {                                           \
      stream<Method::method, bits, slices, CodesEngine>(p);                                     \
    } else {                                                                                    \
      stream<Method::method, bits, slices, FloatEngine>(p);                                     \
    }                                                                                           \
  }
ANYPREC_STREAMS(ANYPREC_DEFINE_STREAM)

// The kernels of products of few rows.
#include "kernels.h"
#include "stream.cuh"

#define ANYPREC_DEFINE_STREAM(name, method, bits, tiles)                                       \
  extern "C" __global__ void __launch_bounds__(32 * anyprec::cuda::kStreamWarps, 2)             \
      name(const __grid_constant__ anyprec::cuda::Stream p) {                                   \
    using namespace anyprec::cuda;                                                              \
    if constexpr (Method::method == Method::kCodes) {                                           \
      stream<Method::method, bits, tiles, CodesEngine>(p);                                     \
    } else {                                                                                    \
      stream<Method::method, bits, tiles, FloatEngine>(p);                                     \
    }                                                                                           \
  }
ANYPREC_STREAMS(ANYPREC_DEFINE_STREAM)

// The kernels before and after products: laying out activations, and adding parts of products.
#include "kernels.h"
#include "prologue.cuh"
#include "reduce.cuh"

#define ANYPREC_DEFINE_PROLOGUE(name, output, given)                                       \
  extern "C" __global__ void __launch_bounds__(512)                                        \
      name(const __grid_constant__ anyprec::cuda::Prologue p) {                            \
    extern __shared__ float pieces[];                                                      \
    anyprec::cuda::begin_next_launch(); /* the product, whose weights don't wait for this */ \
    anyprec::cuda::lay_out_row<anyprec::cuda::Output::output, given, false>(                 \
        p, blockIdx.x, pieces);                                                              \
  }
ANYPREC_PROLOGUES(ANYPREC_DEFINE_PROLOGUE)

extern "C" __global__ void __launch_bounds__(anyprec::cuda::kReduceThreads)
    anyprec_reduce(const __grid_constant__ anyprec::cuda::Reduce p) {
  anyprec::cuda::reduce(p);
}

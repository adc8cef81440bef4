// The kernels of products by float.
#include "gemm.cuh"
#include "kernels.h"

ANYPREC_ALL_BITS(ANYPREC_FLOAT, ANYPREC_DEFINE_GEMM)

// The kernels of products by codes.
#include "gemm.cuh"
#include "kernels.h"

ANYPREC_ALL_BITS(ANYPREC_CODES, ANYPREC_DEFINE_GEMM)

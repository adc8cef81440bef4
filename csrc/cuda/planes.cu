// The kernels of products by planes.
#include "gemm.cuh"
#include "kernels.h"

ANYPREC_ALL_BITS(ANYPREC_PLANES, ANYPREC_DEFINE_GEMM)

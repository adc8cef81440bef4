// The kernels of products of few rows by codes.
#include "kernels.h"
#include "stream.cuh"

ANYPREC_ALL_BITS(ANYPREC_STREAM_CODES, ANYPREC_DEFINE_STREAM)

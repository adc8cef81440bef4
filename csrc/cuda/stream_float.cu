// The kernels of products of few rows with float activations.
#include "kernels.h"
#include "stream.cuh"

ANYPREC_ALL_BITS(ANYPREC_STREAM_FLOAT, ANYPREC_DEFINE_STREAM)

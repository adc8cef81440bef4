// The kernels that there are, by name: one line for each tile shape, method and number of bits.
#pragma once

// Calls X(name, method, bits, tile) for the tiles of one number of bits.
#define ANYPREC_PLANES(X, bits)                               \
  X(anyprec_planes_w##bits##_narrow, kPlanes, bits, kNarrow)  \
  X(anyprec_planes_w##bits##_whole, kPlanes, bits, kWhole)
#define ANYPREC_CODES(X, bits)                             \
  X(anyprec_codes_w##bits##_narrow, kCodes, bits, kNarrow) \
  X(anyprec_codes_w##bits##_medium, kCodes, bits, kMedium) \
  X(anyprec_codes_w##bits##_wide, kCodes, bits, kWide)     \
  X(anyprec_codes_w##bits##_whole, kCodes, bits, kWhole)
#define ANYPREC_FLOAT(X, bits)                             \
  X(anyprec_float_w##bits##_narrow, kFloat, bits, kNarrow) \
  X(anyprec_float_w##bits##_medium, kFloat, bits, kMedium) \
  X(anyprec_float_w##bits##_wide, kFloat, bits, kWide)     \
  X(anyprec_float_w##bits##_whole, kFloat, bits, kWhole)

#define ANYPREC_ALL_BITS(FAMILY, X)                                                     \
  FAMILY(X, 1) FAMILY(X, 2) FAMILY(X, 3) FAMILY(X, 4) FAMILY(X, 5) FAMILY(X, 6) FAMILY(X, 7) \
  FAMILY(X, 8)

// Define the kernel of a line.
#define ANYPREC_DEFINE_GEMM(name, method, bits, tile)                                         \
  extern "C" __global__ void __launch_bounds__(                                               \
      anyprec::cuda::tile_shape(anyprec::cuda::Method::method, bits,                          \
                                anyprec::cuda::Tile::tile).threads(), 1)                      \
      name(const __grid_constant__ anyprec::cuda::Gemm p) {                                   \
    anyprec::cuda::gemm<anyprec::cuda::Method::method, bits, anyprec::cuda::Tile::tile>(p);   \
  }
#define ANYPREC_DEFINE_STREAM(name, method, bits, tiles)                                      \
  extern "C" __global__ void __launch_bounds__(32 * anyprec::cuda::kStreamWarps, 2)            \
      name(const __grid_constant__ anyprec::cuda::Stream p) {                                  \
    anyprec::cuda::stream<anyprec::cuda::Method::method, bits, tiles>(p);                      \
  }

// Calls X(name, output, given) for each kernel that lays activations out: floats, or given codes.
#define ANYPREC_PROLOGUES(X)                        \
  X(anyprec_prologue_planes, kPlanes, false)        \
  X(anyprec_prologue_codes, kCodes, false)          \
  X(anyprec_prologue_float, kFloat, false)          \
  X(anyprec_prologue_plain, kPlain, false)          \
  X(anyprec_prologue_given_planes, kPlanes, true)   \
  X(anyprec_prologue_given_codes, kCodes, true)

// Calls X(name, method, bits, tiles) for the kernels of few rows: blocks of 32 or of 64 columns.
#define ANYPREC_STREAM_CODES(X, bits)                      \
  X(anyprec_stream_codes_w##bits##_n32, kCodes, bits, 1)   \
  X(anyprec_stream_codes_w##bits##_n64, kCodes, bits, 2)
#define ANYPREC_STREAM_FLOAT(X, bits)                      \
  X(anyprec_stream_float_w##bits##_n32, kFloat, bits, 1)   \
  X(anyprec_stream_float_w##bits##_n64, kFloat, bits, 2)
#define ANYPREC_STREAMS(X) \
  ANYPREC_ALL_BITS(ANYPREC_STREAM_CODES, X) ANYPREC_ALL_BITS(ANYPREC_STREAM_FLOAT, X)

// All kernels, in the order of their numbers.
#define ANYPREC_GEMMS(X)                                                             \
  ANYPREC_ALL_BITS(ANYPREC_PLANES, X) ANYPREC_ALL_BITS(ANYPREC_CODES, X)             \
  ANYPREC_ALL_BITS(ANYPREC_FLOAT, X)
#define ANYPREC_KERNELS(X) \
  ANYPREC_GEMMS(X) ANYPREC_STREAMS(X) ANYPREC_PROLOGUES(X) X(anyprec_reduce)

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

// Defines the kernel of a line.
#define ANYPREC_DEFINE_GEMM(name, method, bits, tile)                                         \
  extern "C" __global__ void __launch_bounds__(                                               \
      anyprec::cuda::tile_shape(anyprec::cuda::Method::method, bits,                          \
                                anyprec::cuda::Tile::tile).threads(), 1)                      \
      name(const __grid_constant__ anyprec::cuda::Gemm p) {                                   \
    anyprec::cuda::gemm<anyprec::cuda::Method::method, bits, anyprec::cuda::Tile::tile>(p);   \
  }

// Calls X(name, type, dtype, output) for each type of activations and each output. Given codes are
// laid out for products by planes or codes only.
#define ANYPREC_PROLOGUES(X)                                    \
  ANYPREC_PROLOGUES_OF(X, f32, float, kF32)                     \
  ANYPREC_PROLOGUES_OF(X, f16, __half, kF16)                    \
  ANYPREC_PROLOGUES_OF(X, bf16, __nv_bfloat16, kBF16)           \
  X(anyprec_prologue_u8_planes, uint8_t, kU8, kPlanes)          \
  X(anyprec_prologue_u8_codes, uint8_t, kU8, kCodes)
#define ANYPREC_PROLOGUES_OF(X, short, type, dtype)             \
  X(anyprec_prologue_##short##_planes, type, dtype, kPlanes)    \
  X(anyprec_prologue_##short##_codes, type, dtype, kCodes)      \
  X(anyprec_prologue_##short##_float, type, dtype, kFloat)      \
  X(anyprec_prologue_##short##_plain, type, dtype, kPlain)

#define ANYPREC_DEFINE_PROLOGUE(name, type, dtype, output)                          \
  extern "C" __global__ void __launch_bounds__(512)                                 \
      name(const __grid_constant__ anyprec::cuda::Prologue p) {                     \
    anyprec::cuda::prologue<type, anyprec::cuda::Output::output>(p);                \
  }

// All kernels, in the order of their numbers.
#define ANYPREC_GEMMS(X)                                                             \
  ANYPREC_ALL_BITS(ANYPREC_PLANES, X) ANYPREC_ALL_BITS(ANYPREC_CODES, X)             \
  ANYPREC_ALL_BITS(ANYPREC_FLOAT, X)
#define ANYPREC_KERNELS(X) ANYPREC_GEMMS(X) ANYPREC_PROLOGUES(X) X(anyprec_reduce)

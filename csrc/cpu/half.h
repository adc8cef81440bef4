// float16 and bfloat16 in memory, to and from float32, rounding to nearest even.
// Everything here has internal linkage: it is compiled again for each instruction set, and the
// linker must never pick the AVX-512 copy for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace anyprec::cpu {
namespace {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// float16 by hand: _Float16 is missing in C++ from GCC 11 and from GCC for arm64. Subnormals go
// through integers, because threads of XLA flush subnormal floats.
inline float to_float(F16 x) {
  uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x0400u) {
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  }
  uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinity and NaN
  return float_of(sign | ((magnitude << 13) + exponent));
}
inline void from_float(float x, F16& out) {
  uint32_t sign = (bits_of(x) >> 16) & 0x8000u, u = bits_of(x) & 0x7fffffffu;
  uint32_t half;
  if (u > 0x7f800000u) {
    half = 0x7e00u;
  } else if (u >= 0x47800000u) {  // 65536 and more
    half = 0x7c00u;
  } else if (u < 0x38800000u) {  // below 2^-14; adding 2^23 rounds to an integer
    half = bits_of(float_of(u) * 0x1p24f + 0x1p23f) - 0x4b000000u;
  } else {
    half = (u + 0xfffu + ((u >> 13) & 1) - 0x38000000u) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

inline float to_float(BF16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline void from_float(float x, BF16& out) {
  uint32_t u = bits_of(x);
  bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float to_float(float x) { return x; }
inline void from_float(float x, float& out) { out = x; }

// Eight consecutive values to float32.
template <typename T>
inline void widen8(const T* x, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = to_float(x[i]);
}
#ifdef __F16C__
inline void widen8(const F16* x, float* out) {
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
#endif

// Calls f with a typed pointer for `dtype`.
template <typename F>
inline void with_dtype(DType dtype, const void* p, F&& f) {
  switch (dtype) {
    case DType::kF32: return f(static_cast<const float*>(p));
    case DType::kF16: return f(static_cast<const F16*>(p));
    case DType::kBF16: return f(static_cast<const BF16*>(p));
  }
}

}  // namespace
}  // namespace anyprec::cpu

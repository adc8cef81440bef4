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
  _Float16 bits;
};
struct BF16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(F16 x) { return static_cast<float>(x.bits); }
inline float to_float(BF16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, F16& out) { out.bits = static_cast<_Float16>(x); }
inline void from_float(float x, BF16& out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : rounded);
}

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

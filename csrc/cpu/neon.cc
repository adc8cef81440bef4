// The kernels with Advanced SIMD and dot products (Armv8.2: Graviton 2, Apple M1 and newer); null
// where the compiler targets no such processor. vector4.h says what each operation means.
#include "vector4.h"

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>

namespace anyprec::cpu {
namespace {

struct Isa : Vector4 {
  static constexpr const char* kName = "neon";

  static V popcount(V a) {
    return (V)vpaddlq_u16(vpaddlq_u8(vcntq_u8((uint8x16_t)a)));
  }

  // Codes of less than 8 bits are signed bytes too. Those of 8 bits are taken less 128, and
  // 128 x is given back as 64 x twice.
  template <int W>
  static V dot4(V acc, V w, V x) {
    auto sum = (int32x4_t)acc;
    auto codes = (int8x16_t)w, values = (int8x16_t)x;
    if constexpr (W < 8) return (V)vdotq_s32(sum, codes, values);
    sum = vdotq_s32(sum, veorq_s8(codes, vdupq_n_s8(-128)), values);
    auto half = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(64), values);
    return (V)vaddq_s32(sum, vshlq_n_s32(half, 1));
  }

  static F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
  static F load_half(const uint16_t* p) {
    return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* neon_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

#else
namespace anyprec::cpu {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace anyprec::cpu
#endif

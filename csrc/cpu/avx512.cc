// The kernels with AVX-512 F, BW, DQ, VL, VNNI and VPOPCNTDQ (Ice Lake, Zen 4 and newer).
// vector4.h says what each operation of Isa means.
#include "kernels.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

#include <cstring>

#include "x86.h"

namespace anyprec::cpu {
namespace {

struct Isa {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 8;
  static constexpr bool kScaledFields = true;
  using V = __m512i;
  using F = __m512;

  static V zero() { return _mm512_setzero_si512(); }
  static V broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static V sub(V a, V b) { return _mm512_sub_epi32(a, b); }
  static V mul(V a, V b) { return _mm512_mullo_epi32(a, b); }
  static V shl(V a, int n) { return _mm512_slli_epi32(a, n); }
  static V sar(V a, int n) { return _mm512_srai_epi32(a, n); }
  static V shr(V a, int n) { return _mm512_srli_epi32(a, n); }
  static V bit_and(V a, V b) { return _mm512_and_si512(a, b); }
  static V bit_or(V a, V b) { return _mm512_or_si512(a, b); }
  static V bit_xor(V a, V b) { return _mm512_xor_si512(a, b); }
  static V load_ints(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(uint32_t* p, V a) { _mm512_storeu_si512(p, a); }
  static V popcount(V a) { return _mm512_popcnt_epi32(a); }
  template <int W>
  static V dot4(V acc, V w, V x) {
    return _mm512_dpbusd_epi32(acc, w, x);
  }

  // Transposes 4 x 4 lanes inside each 128 bits.
  static void transpose4(const V (&r)[4], V& w, V& x, V& y, V& z) {
    V a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    V c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    w = _mm512_unpacklo_epi64(a, c);
    x = _mm512_unpackhi_epi64(a, c);
    y = _mm512_unpacklo_epi64(b, d);
    z = _mm512_unpackhi_epi64(b, d);
  }

  // Rows i, i + 4, i + 8 and i + 12 share a register, so 4 x 4 transposes inside 128 bits put
  // rows in order.
  static void load_words(const uint32_t* p, int64_t stride, int rows, int words, V* out) {
    for (int half = 0; half < 2 && half * 4 < words; ++half) {
      int left = words - half * 4;
      bool full = rows == kLanes && left >= 4;
      V r[4];
      for (int i = 0; i < 4; ++i) {
        const uint32_t* row = p + i * stride + half * 4;
        r[i] = full ? gather4<true>(row, stride, 4, 4) : gather4<false>(row, stride, rows - i, left);
      }
      V* quarter = out + half * 4;
      transpose4(r, quarter[0], quarter[1], quarter[2], quarter[3]);
    }
  }

  // Up to four words from each of rows 0, 4, 8 and 12 that exist.
  template <bool Full>
  static V gather4(const uint32_t* p, int64_t stride, int rows, int words) {
    V v = _mm512_castsi128_si512(load4<Full>(p, rows > 0, words));
    v = _mm512_inserti32x4(v, load4<Full>(p + 4 * stride, rows > 4, words), 1);
    v = _mm512_inserti32x4(v, load4<Full>(p + 8 * stride, rows > 8, words), 2);
    return _mm512_inserti32x4(v, load4<Full>(p + 12 * stride, rows > 12, words), 3);
  }

  template <bool Full>
  static __m128i load4(const uint32_t* p, bool valid, int words) {
    if (Full) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    int live = valid ? (words < 4 ? words : 4) : 0;
    return _mm_maskz_loadu_epi32(static_cast<__mmask8>((1u << live) - 1), p);
  }

  static uint32_t pack_word(const uint8_t* codes, int bit) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm256_movepi8_mask(_mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - bit)));
  }

  static F fzero() { return _mm512_setzero_ps(); }
  static F fbroadcast(float x) { return _mm512_set1_ps(x); }
  static F fadd(F a, F b) { return _mm512_add_ps(a, b); }
  static F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F as_float(V a) { return _mm512_castsi512_ps(a); }
  static F to_float(V a) { return _mm512_cvtepi32_ps(a); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bfloat(const uint16_t* p) {
    V wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return as_float(_mm512_slli_epi32(wide, 16));
  }

  template <int H>
  static F swap_lanes(F a) {
    if constexpr (H == 1) return _mm512_permute_ps(a, 0xb1);
    if constexpr (H == 2) return _mm512_permute_ps(a, 0x4e);
    if constexpr (H == 4) return _mm512_shuffle_f32x4(a, a, 0xb1);
    return _mm512_shuffle_f32x4(a, a, 0x4e);
  }
  template <int H>
  static F negate_upper(F a) {
    constexpr __mmask16 kUpper = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
    V bits = _mm512_castps_si512(a), sign = broadcast(INT32_MIN);
    return as_float(_mm512_mask_xor_epi32(bits, kUpper, bits, sign));
  }
  static void transpose_8x4(const uint8_t* in, uint8_t* out) { transpose_8x4_bytes(in, out); }
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* avx512_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

#else
namespace anyprec::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace anyprec::cpu
#endif

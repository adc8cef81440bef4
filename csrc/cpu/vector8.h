// What the kernels ask of an instruction set, with AVX2, FMA and F16C. vector4.h says what each
// operation means. Everything has internal linkage, see half.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "x86.h"

namespace anyprec::cpu {
namespace {

struct Vector8 {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 4;
  static constexpr bool kScaledFields = false;  // dot4 of 8 bits is slower
  using V = __m256i;
  using F = __m256;

  static V zero() { return _mm256_setzero_si256(); }
  static V broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static V mul(V a, V b) { return _mm256_mullo_epi32(a, b); }
  static V sub(V a, V b) { return _mm256_sub_epi32(a, b); }
  static V shl(V a, int n) { return _mm256_slli_epi32(a, n); }
  static V sar(V a, int n) { return _mm256_srai_epi32(a, n); }
  static V shr(V a, int n) { return _mm256_srli_epi32(a, n); }
  static V bit_and(V a, V b) { return _mm256_and_si256(a, b); }
  static V bit_or(V a, V b) { return _mm256_or_si256(a, b); }
  static V bit_xor(V a, V b) { return _mm256_xor_si256(a, b); }
  static V load_ints(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_ints(uint32_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }

  // Nibbles by table, then bytes to lanes.
  static V popcount(V a) {
    const V table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1,
                                     2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const V low = _mm256_set1_epi8(15);
    V counts = _mm256_add_epi8(
        _mm256_shuffle_epi8(table, _mm256_and_si256(a, low)),
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), low)));
    V pairs = _mm256_maddubs_epi16(counts, _mm256_set1_epi8(1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  // vpmaddubsw adds pairs in 16 bits, which hold 2 * 127 * 128; codes of 8 bits would saturate, so
  // their even and odd bytes are widened first.
  template <int W>
  static V dot4(V acc, V w, V x) {
    if constexpr (W < 8) {
      return add(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    } else {
      V x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
      V x_odd = _mm256_srai_epi16(x, 8);
      V w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
      V w_odd = _mm256_srli_epi16(w, 8);
      acc = add(acc, _mm256_madd_epi16(w_even, x_even));
      return add(acc, _mm256_madd_epi16(w_odd, x_odd));
    }
  }

  // Rows i and i + 4 share a register, so 4 x 4 transposes inside 128 bits put rows in order.
  static void load_words(const uint32_t* p, int64_t stride, int rows, int words, V* out) {
    for (int half = 0; half < 2 && half * 4 < words; ++half) {
      V r[4];
      for (int i = 0; i < 4; ++i) {
        __m128i lo = load4(p + i * stride + half * 4, i < rows, words - half * 4);
        __m128i hi = load4(p + (i + 4) * stride + half * 4, i + 4 < rows, words - half * 4);
        r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1);
      }
      V a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
      V c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
      out[half * 4 + 0] = _mm256_unpacklo_epi64(a, c);
      out[half * 4 + 1] = _mm256_unpackhi_epi64(a, c);
      out[half * 4 + 2] = _mm256_unpacklo_epi64(b, d);
      out[half * 4 + 3] = _mm256_unpackhi_epi64(b, d);
    }
  }

  static __m128i load4(const uint32_t* p, bool valid, int words) {
    __m128i live = _mm_cmpgt_epi32(_mm_set1_epi32(valid ? words : 0), _mm_setr_epi32(0, 1, 2, 3));
    return _mm_maskload_epi32(reinterpret_cast<const int*>(p), live);
  }

  static uint32_t pack_word(const uint8_t* codes, int bit) {
    V v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    v = _mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - bit));
    return static_cast<uint32_t>(_mm256_movemask_epi8(v));
  }

  static F fzero() { return _mm256_setzero_ps(); }
  static F fbroadcast(float x) { return _mm256_set1_ps(x); }
  static F fadd(F a, F b) { return _mm256_add_ps(a, b); }
  static F fsub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F fmul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F as_float(V a) { return _mm256_castsi256_ps(a); }
  static F to_float(V a) { return _mm256_cvtepi32_ps(a); }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_bfloat(const uint16_t* p) {
    V wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return as_float(shl(wide, 16));
  }

  template <int H>
  static F swap_lanes(F a) {
    if constexpr (H == 1) return _mm256_permute_ps(a, 0xb1);
    if constexpr (H == 2) return _mm256_permute_ps(a, 0x4e);
    return _mm256_permute2f128_ps(a, a, 1);
  }
  template <int H>
  static F negate_upper(F a) {
    auto sign = [](int lane) { return lane & H ? -0.0f : 0.0f; };
    return _mm256_xor_ps(a, _mm256_setr_ps(sign(0), sign(1), sign(2), sign(3), sign(4), sign(5),
                                           sign(6), sign(7)));
  }
  static void transpose_8x4(const uint8_t* in, uint8_t* out) { transpose_8x4_bytes(in, out); }
};

}  // namespace
}  // namespace anyprec::cpu

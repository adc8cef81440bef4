// The kernels with AVX-512 F, BW, DQ, VL, VBMI, VNNI, VPOPCNTDQ and GFNI (Ice Lake, Zen 4 and
// newer).
// portable.cc says what each operation of Isa means.
#include "kernels.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

#include <cstring>

#include "expand.h"

namespace anyprec::cpu {
namespace {

struct Isa {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kRows = 8;
  using V = __m512i;
  using F = __m512;

  static V zero() { return _mm512_setzero_si512(); }
  static V broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static V mul(V a, V b) { return _mm512_mullo_epi32(a, b); }
  static V shl(V a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  static V bit_and(V a, V b) { return _mm512_and_si512(a, b); }
  static void store_ints(int32_t* p, V a) { _mm512_storeu_si512(p, a); }
  static V popcount(V a) { return _mm512_popcnt_epi32(a); }
  static V dot4(V acc, V w, int32_t x) { return _mm512_dpbusd_epi32(acc, w, broadcast(x)); }

  // vpmultishiftqb brings bit 4 * quad + b of each 32-bit lane to the low bit of its byte b.
  static V append_bits(V codes, V word, int quad) {
    V offsets = _mm512_set1_epi64(0x2322212003020100LL + 0x0404040404040404LL * quad);
    V spread = _mm512_multishift_epi64_epi8(offsets, word);
    // (a | (b & c)): keep the doubled code, add the low bit.
    return _mm512_ternarylogic_epi64(_mm512_add_epi8(codes, codes), spread, _mm512_set1_epi8(1),
                                     0xf8);
  }

  // One or two planes are as fast bit by bit.
  template <int W>
  static void expand(const V (&planes)[W], V* quads) {
    if constexpr (W <= 2) {
      append_planes<Isa>(planes, quads);
    } else {
      transpose_bits<W>(planes, quads);
    }
  }

  // The codes of a word from its planes: GFNI turns 8 x 8 bits, whose rows are the planes of eight
  // indices, into eight codes.
  template <int W>
  static void transpose_bits(const V (&planes)[W], V* quads) {
    // An affine product with the unit vectors reads bit m of the matrix rows, the first row as the
    // most significant bit.
    const V units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201ULL));
    auto plane = [&](int bit) { return bit < W ? planes[W - 1 - bit] : zero(); };
    V low[4];  // row 4 L + i of lane L: a byte of each of four planes, for octets 0 .. 3
    interleave4(plane(3), plane(2), plane(1), plane(0), low);
    V a[4], b[4];
    if constexpr (W <= 4) {
      // Two octets share a matrix: codes of octets 0 and 2 in the high nibbles, 1 and 3 in the low.
      const V nibble = _mm512_set1_epi8(15);
      for (int i = 0; i < 4; ++i) {
        V codes = _mm512_gf2p8affine_epi64_epi8(units, low[i], 0);
        a[i] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
        b[i] = _mm512_and_si512(codes, nibble);
      }
      transpose4(a, quads[0], quads[1], quads[4], quads[5]);
      transpose4(b, quads[2], quads[3], quads[6], quads[7]);
    } else {
      V high[4];
      interleave4(plane(7), plane(6), plane(5), plane(4), high);
      for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_unpacklo_epi32(high[i], low[i]), 0);
        b[i] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_unpackhi_epi32(high[i], low[i]), 0);
      }
      transpose4(a, quads[0], quads[1], quads[2], quads[3]);
      transpose4(b, quads[4], quads[5], quads[6], quads[7]);
    }
  }

  // Byte o of lane 4 L + i of a, b, c and d go to lane 4 L + o of out[i].
  static void interleave4(V a, V b, V c, V d, V (&out)[4]) {
    V ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
    ab = _mm512_unpackhi_epi8(a, b), cd = _mm512_unpackhi_epi8(c, d);
    out[2] = _mm512_unpacklo_epi16(ab, cd);
    out[3] = _mm512_unpackhi_epi16(ab, cd);
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
  static F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F as_float(V a) { return _mm512_castsi512_ps(a); }
  static F to_float(V a) { return _mm512_cvtepi32_ps(a); }
  static F byte_to_float(V a, int b) {
    V byte = _mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(8 * b)), broadcast(0xff));
    return to_float(byte);
  }
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

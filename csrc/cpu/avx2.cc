// The kernels with AVX2, FMA and F16C; null where the compiler targets no x86-64.
// portable.cc says what each operation of Isa means.
#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

#include <cstring>

#include "expand.h"

namespace anyprec::cpu {
namespace {

struct Isa {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kRows = 4;
  using V = __m256i;
  using F = __m256;

  static V zero() { return _mm256_setzero_si256(); }
  static V broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static V mul(V a, V b) { return _mm256_mullo_epi32(a, b); }
  static V shl(V a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  static V bit_and(V a, V b) { return _mm256_and_si256(a, b); }
  static void store_ints(int32_t* p, V a) {
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

  // vpmaddubsw would saturate, so even and odd bytes go through 16 bits.
  static V dot4(V acc, V w, int32_t x) {
    V xs = _mm256_set1_epi32(x);
    V x_even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8);
    V x_odd = _mm256_srai_epi16(xs, 8);
    V w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
    V w_odd = _mm256_srli_epi16(w, 8);
    acc = add(acc, _mm256_madd_epi16(w_even, x_even));
    return add(acc, _mm256_madd_epi16(w_odd, x_odd));
  }

  // Byte quad / 2 of the word goes to all four bytes; each keeps its own bit.
  static V append_bits(V codes, V word, int quad) {
    V lane_base = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404,
                                    0x08080808, 0x0c0c0c0c);
    V spread = _mm256_shuffle_epi8(word, add(lane_base, _mm256_set1_epi8(quad / 2)));
    V bit = _mm256_set1_epi32(quad % 2 ? static_cast<int>(0x80402010u) : 0x08040201);
    V is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_sub_epi8(_mm256_add_epi8(codes, codes), is_set);
  }

  template <int W>
  static void expand(const V (&planes)[W], V* quads) {
    append_planes<Isa>(planes, quads);
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
  static F fmul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F as_float(V a) { return _mm256_castsi256_ps(a); }
  static F to_float(V a) { return _mm256_cvtepi32_ps(a); }
  static F byte_to_float(V a, int b) {
    V byte = _mm256_and_si256(_mm256_srl_epi32(a, _mm_cvtsi32_si128(8 * b)),
                              _mm256_set1_epi32(0xff));
    return to_float(byte);
  }
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

#else
namespace anyprec::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace anyprec::cpu
#endif

// What the x86-64 instruction sets share.
#pragma once

#include <emmintrin.h>

#include <cstdint>

namespace anyprec::cpu {
namespace {

// Byte 8 b + q of 32 goes to 4 q + b.
inline void transpose_8x4_bytes(const uint8_t* in, uint8_t* out) {
  auto row = [&](int b) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + 8 * b)); };
  __m128i low = _mm_unpacklo_epi8(row(0), row(1)), high = _mm_unpacklo_epi8(row(2), row(3));
  auto* quads = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(quads, _mm_unpacklo_epi16(low, high));
  _mm_storeu_si128(quads + 1, _mm_unpackhi_epi16(low, high));
}

}  // namespace
}  // namespace anyprec::cpu

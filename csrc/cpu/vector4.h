// What the kernels ask of an instruction set, in vectors of 16 bytes of GCC and Clang: any
// architecture. Everything has internal linkage, see half.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace anyprec::cpu {
namespace {

struct Vector4 {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 4;  // of output columns that are worked on together
  static constexpr int kRows = 4;     // rows of activations that are
  static constexpr bool kScaledFields = false;  // whether 8-bit codes multiply as fast as others
  typedef int32_t V __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));

  static V zero() { return V{}; }
  static V broadcast(int32_t x) { return V{} + x; }
  // Sums wrap, as in every instruction set.
  static V add(V a, V b) { return (V)((U)a + (U)b); }
  static V mul(V a, V b) { return (V)((U)a * (U)b); }
  static V sub(V a, V b) { return (V)((U)a - (U)b); }
  static V shl(V a, int n) { return (V)((U)a << n); }
  static V sar(V a, int n) { return a >> n; }
  static V shr(V a, int n) { return (V)((U)a >> n); }
  static V bit_and(V a, V b) { return a & b; }
  static V bit_or(V a, V b) { return a | b; }
  static V bit_xor(V a, V b) { return a ^ b; }
  static V load_ints(const uint32_t* p) {
    V a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store_ints(uint32_t* p, V a) { std::memcpy(p, &a, sizeof a); }

  static V popcount(V a) {
    U u = (U)a;
    u -= (u >> 1) & 0x55555555u;
    u = (u & 0x33333333u) + ((u >> 2) & 0x33333333u);
    u = (u + (u >> 4)) & 0x0f0f0f0fu;
    return (V)((u * 0x01010101u) >> 24);
  }

  // acc + the sum over four bytes of (unsigned w, a code of W bits) * (signed x).
  template <int W>
  static V dot4(V acc, V w, V x) {
    for (int b = 0; b < 4; ++b) {
      V codes = (V)(((U)w >> (8 * b)) & 0xffu);
      acc += codes * ((V)((U)x << (24 - 8 * b)) >> 24);
    }
    return acc;
  }

  // out[t] lane n = word t of row n, for n < rows and t < words; other lanes are 0.
  static void load_words(const uint32_t* p, int64_t stride, int rows, int words, V* out) {
    for (int t = 0; t < words; ++t) {
      int32_t lanes[kLanes] = {};
      for (int n = 0; n < rows; ++n) std::memcpy(&lanes[n], p + n * stride + t, 4);
      std::memcpy(&out[t], lanes, sizeof lanes);
    }
  }

  // Bit `bit` of 32 codes, the first in the least significant place.
  static uint32_t pack_word(const uint8_t* codes, int bit) {
    uint32_t word = 0;
    for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>((codes[i] >> bit) & 1) << i;
    return word;
  }

  static F fzero() { return F{}; }
  static F fbroadcast(float x) { return F{} + x; }
  static F fadd(F a, F b) { return a + b; }
  static F fsub(F a, F b) { return a - b; }
  static F fmul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F as_float(V a) { return (F)a; }
  static F to_float(V a) { return __builtin_convertvector(a, F); }
  static F load_half(const uint16_t* p) {
    auto half = [&](int i) { return cpu::to_float(F16{p[i]}); };
    return F{half(0), half(1), half(2), half(3)};
  }
  static F load_bfloat(const uint16_t* p) {
    return as_float((V)(U{p[0], p[1], p[2], p[3]} << 16));
  }

  // Lane i gets lane i ^ H.
  template <int H>
  static F swap_lanes(F a) {
    return F{a[0 ^ H], a[1 ^ H], a[2 ^ H], a[3 ^ H]};
  }
  // Lanes i with i & H change sign.
  template <int H>
  static F negate_upper(F a) {
    constexpr uint32_t kSign = 0x80000000u;
    return (F)((U)a ^ U{0, H & 1 ? kSign : 0, H & 2 ? kSign : 0, kSign});
  }
  // Byte 8 b + q of 32 goes to 4 q + b.
  static void transpose_8x4(const uint8_t* in, uint8_t* out) {
    for (int q = 0; q < 8; ++q) {
      for (int b = 0; b < 4; ++b) out[4 * q + b] = in[8 * b + q];
    }
  }
};

}  // namespace
}  // namespace anyprec::cpu

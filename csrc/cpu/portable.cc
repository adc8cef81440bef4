// The kernels in portable C++ (GCC and Clang vector extensions): any architecture.
#include <cstdint>
#include <cstring>

#include "expand.h"

namespace anyprec::cpu {
namespace {

struct Isa {
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 4;
  static constexpr int kRows = 4;  // rows of activations held in registers
  typedef int32_t V __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));

  static V zero() { return V{}; }
  static V broadcast(int32_t x) { return V{} + x; }
  // Sums wrap, as in every instruction set.
  static V add(V a, V b) { return (V)((U)a + (U)b); }
  static V mul(V a, V b) { return (V)((U)a * (U)b); }
  static V shl(V a, int n) { return (V)((U)a << n); }
  static V bit_and(V a, V b) { return a & b; }
  static void store_ints(int32_t* p, V a) { std::memcpy(p, &a, sizeof a); }

  static V popcount(V a) {
    U u = (U)a;
    u -= (u >> 1) & 0x55555555u;
    u = (u & 0x33333333u) + ((u >> 2) & 0x33333333u);
    u = (u + (u >> 4)) & 0x0f0f0f0fu;
    return (V)((u * 0x01010101u) >> 24);
  }

  // acc + the sum over four bytes of (unsigned w byte) * (signed x byte).
  static V dot4(V acc, V w, int32_t x) {
    for (int b = 0; b < 4; ++b) {
      U bytes = ((U)w >> (8 * b)) & 0xffu;
      acc += (V)bytes * static_cast<int8_t>(x >> (8 * b));
    }
    return acc;
  }

  // Byte b of each lane becomes 2 * byte + (bit 4 * quad + b of the lane of `word`).
  static V append_bits(V codes, V word, int quad) {
    U nibble = ((U)word >> (4 * quad)) & 0xfu;
    return (V)(((U)codes << 1) | ((nibble * 0x00204081u) & 0x01010101u));
  }

  // Codes of a word from its planes, the most significant first: quads[i] gets indices
  // 4 i .. 4 i + 3, a byte each.
  template <int W>
  static void expand(const V (&planes)[W], V* quads) {
    append_planes<Isa>(planes, quads);
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
  static F byte_to_float(V a, int b) { return to_float((V)(((U)a >> (8 * b)) & 0xffu)); }
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* portable_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

// Words of fields, in which prepared weights lie, to what instructions multiply; see format.h.
//
// A number of bits is the sum of parts of 8, 4, 2 and 1 bits. Lane q of a quad of lanes multiplies
// the codes of indices q, q + 8, q + 16, q + 24 ("quad" q of a word of 32 indices) and those of
// quad q + 4.
#pragma once

#include <cstdint>

namespace anyprec::cuda {

// What is above `bits` of the parts that a number of `all` bits has, from the low ones on.
constexpr int part_size(int all, int bits) {
  int left = all - bits;
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

constexpr uint32_t repeat_byte(uint32_t byte) { return byte * 0x01010101u; }

// Swaps the high bits of a with the low bits of b, in blocks of `distance` bits.
template <int kDistance>
__device__ inline void swap_blocks(uint32_t& a, uint32_t& b) {
  constexpr uint32_t kLow =
      kDistance == 4 ? 0x0f0f0f0fu : kDistance == 2 ? 0x33333333u : 0x55555555u;
  uint32_t low = (a & kLow) | ((b & kLow) << kDistance);
  b = ((a >> kDistance) & kLow) | (b & ~kLow);
  a = low;
}

// `kBits` words of fields of one column to words of planes, the least significant first.
template <int kBits>
__device__ inline void fields_to_planes(uint32_t (&x)[kBits]) {
  constexpr int kSize = part_size(kBits, 0);
  if constexpr (kSize == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) swap_blocks<4>(x[i], x[i + 4]);
  }
  if constexpr (kSize >= 4) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (!(i & 2)) swap_blocks<2>(x[i], x[i + 2]);
    }
  }
  if constexpr (kSize >= 2) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) swap_blocks<1>(x[i], x[i + 1]);
  }
  if constexpr (kBits > kSize) {
    uint32_t(&rest)[kBits - kSize] = *reinterpret_cast<uint32_t(*)[kBits - kSize]>(x + kSize);
    fields_to_planes<kBits - kSize>(rest);
  }
}

// Which word of a part holds quad q, and from which bit up.
template <int kSize>
__device__ inline int field_word(int quad) {
  return quad % kSize;
}
template <int kSize>
__device__ inline int field_shift(int quad) {
  return kSize * (quad / kSize);
}

// The four codes of quads q and q + 4 of two columns, in the four bytes of lo and hi, `kShift` bits
// up. read(i) gives word i of these columns, of `kBits` in all.
template <int kBits, int kShift, int kFirst = 0, typename Read>
__device__ inline void read_quads(int q, const Read& read, uint32_t (&lo)[2], uint32_t (&hi)[2]) {
  constexpr int kSize = part_size(kBits, kFirst);
  constexpr uint32_t kMask = repeat_byte(((1u << kSize) - 1) << (kFirst + kShift) & 0xffu);
  uint2 low = read(kFirst + field_word<kSize>(q));
  uint2 high = kSize == 8 ? read(field_word<8>(q + 4)) : low;
  // Rotated, because a lane's field may lie below or above its place in the code.
  auto take = [](uint32_t x, int turn) { return __funnelshift_r(x, x, turn) & kMask; };
  int turn = field_shift<kSize>(q) - kFirst - kShift;
  int high_turn = field_shift<kSize>(q + 4) - kFirst - kShift;
  if (kFirst == 0) lo[0] = lo[1] = hi[0] = hi[1] = 0;
  lo[0] |= take(low.x, turn), lo[1] |= take(low.y, turn);
  hi[0] |= take(high.x, high_turn), hi[1] |= take(high.y, high_turn);
  if constexpr (kFirst + kSize < kBits) {
    read_quads<kBits, kShift, kFirst + kSize>(q, read, lo, hi);
  }
}

}  // namespace anyprec::cuda

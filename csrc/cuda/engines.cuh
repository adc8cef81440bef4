// How one block of weights and activations in shared memory is multiplied: an engine for each
// method. Weights are the 16-row operand of the instructions and activations the 8-column one.
//
// A strip of 16 columns is one such operand. Lane 4 g + q of a warp has columns 2 g and 2 g + 1 of
// it, as rows g and g + 8 of the operand: its words of both come with one load. So a result t[c] of
// a strip and a slice is that of column 2 g + c / 2 and row 2 q + c % 2.
#pragma once

#include "fields.cuh"
#include "ptx.cuh"
#include "tiles.h"

namespace anyprec::cuda {

// What a lane reads of a stage: its two columns of a strip, and its row of a slice.
template <int kRowBytes>
struct Stage {
  const uint8_t* weights;      // of the lane's columns in the first strip
  const uint8_t* activations;  // of the lane's row in the first slice

  __device__ uint2 columns(int row, int strip) const {
    return *reinterpret_cast<const uint2*>(weights + row * kRowBytes + strip * 64);
  }
  __device__ uint4 values(int slice) const {
    return *reinterpret_cast<const uint4*>(activations + slice * 8 * kBlockBytes);
  }
};

// Lo and hi of both columns of a strip, as instructions take them.
struct Operand {
  uint32_t w[4];

  __device__ Operand(const uint32_t (&lo)[2], const uint32_t (&hi)[2])
      : w{lo[0], lo[1], hi[0], hi[1]} {}
};

// Adds the products of a strip by half `odd` of the lanes' values of each slice.
template <typename Mma, typename Value, int kSlices>
__device__ inline void multiply_strip(const Mma& mma, Value (&t)[kSlices][4], const Operand& operand,
                                      const uint4 (&x)[kSlices], int odd) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    mma(t[s], operand.w, odd ? x[s].z : x[s].x, odd ? x[s].w : x[s].y);
  }
}

// --- 8-bit codes: exact sums of signed bytes by unsigned codes ---

template <int kBits, int kStrips, int kSlices>
struct CodesEngine {
  using Value = int32_t;

  Value t[kStrips][kSlices][4];

  // The weights of a strip in word `word` of a block.
  template <typename Stage>
  __device__ static Operand weights(int q, const Stage& stage, int strip, int word) {
    uint32_t lo[2], hi[2];
    read_quads<kBits, 0>(
        q, [&](int field) { return stage.columns(word * kBits + field, strip); }, lo, hi);
    return {lo, hi};
  }
  __device__ void multiply(int strip, const Operand& w, const uint4 (&x)[kSlices], int word) {
    multiply_strip(mma_bytes, t[strip], w, x, word);
  }
};

// --- float activations: bfloat16 parts by the odd integers of the weights ---

constexpr uint32_t repeat_half(uint32_t half) { return half * 0x00010001u; }
constexpr uint32_t kBfloatOne = 0x3f80u;

// Two bytes of a quad (0 and 2, or 1 and 3) under the same upper byte: bfloat16 whose low
// significant bits are the byte.
template <uint32_t kUpper>
__device__ inline uint32_t widen_pair(uint32_t quad, int odd) {
  return __byte_perm(quad, repeat_byte(kUpper), odd ? 0x4341 : 0x4240);
}

// Bytes of a quad (0 and 2, or 1 and 3) as odd integers q = 2 u - L, in bfloat16, exact. The bytes
// are 2 u up to 6 bits, otherwise u.
template <int kBits>
__device__ inline uint32_t odd_integers(uint32_t quad, int odd) {
  constexpr uint32_t kOne = repeat_half(kBfloatOne);
  if constexpr (kBits <= 6) {
    // 0x4300 | v is 128 + v, and 128 + L has 8 significant bits.
    constexpr uint32_t kMinus = repeat_half(0xc300u + max_level(kBits));
    return fma_bfloat2(widen_pair<0x43>(quad, odd), kOne, kMinus);
  } else {
    // 0x4380 | v of the low 7 bits v is 256 + 2 v.
    constexpr uint32_t kMinus256 = repeat_half(0xc380u);
    uint32_t pair = widen_pair<0>(quad, odd);
    uint32_t low = (pair & repeat_half(0x7f)) | repeat_half(0x4380);
    uint32_t twice = fma_bfloat2(low, kOne, kMinus256);
    uint32_t rest = repeat_half(0xc2feu);  // -127
    if constexpr (kBits == 8) {
      // -255, or 256 - 255 where the top bit is set.
      uint32_t top = ((pair >> 7) & repeat_half(1)) * 0xffffu;
      rest = (top & repeat_half(0xc37fu ^ kBfloatOne)) ^ repeat_half(0xc37fu);
    }
    return fma_bfloat2(twice, kOne, rest);
  }
}

template <int kBits>
__device__ inline Operand bfloat_operand(const uint32_t (&quads)[2]) {
  const uint32_t even[2] = {odd_integers<kBits>(quads[0], 0), odd_integers<kBits>(quads[1], 0)};
  const uint32_t odd[2] = {odd_integers<kBits>(quads[0], 1), odd_integers<kBits>(quads[1], 1)};
  return {even, odd};
}

template <int kBits, int kStrips, int kSlices>
struct FloatEngine {
  using Value = float;
  struct Operands {
    Operand half[2];
  };

  Value t[kStrips][kSlices][4];

  // The weights of a strip; blocks have one word.
  template <typename Stage>
  __device__ static Operands weights(int q, const Stage& stage, int strip, int) {
    uint32_t quads[2][2];
    read_quads<kBits, (kBits <= 6)>(
        q, [&](int field) { return stage.columns(field, strip); }, quads[0], quads[1]);
    return {bfloat_operand<kBits>(quads[0]), bfloat_operand<kBits>(quads[1])};
  }
  __device__ void multiply(int strip, const Operands& w, const uint4 (&x)[kSlices], int) {
#pragma unroll
    for (int h = 0; h < 2; ++h) multiply_strip(mma_bfloat, t[strip], w.half[h], x, h);
  }
};

// --- bit planes: a set of counts for each plane of the weights ---

template <int kBits, int kStrips, int kSlices>
struct PlanesEngine {
  int32_t counts[kBits][kStrips][kSlices][4];
  int32_t ones[kBits][kStrips][4];  // set bits of the weights: a product by ones

  template <typename Stage>
  __device__ void multiply(int q, const Stage& stage, const uint4 (&x)[kSlices], bool count_ones) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        uint32_t lo[kBits][2], hi[kBits][2];
        read_planes(stage, 8 * step + q, i, lo);
        read_planes(stage, 8 * step + q + 4, i, hi);
#pragma unroll
        for (int j = 0; j < kBits; ++j) {
          const Operand w(lo[j], hi[j]);
          multiply_strip(mma_and_popcount, counts[j][i], w, x, step);
          if (count_ones) mma_and_popcount(ones[j][i], w.w, ~0u, ~0u);
        }
      }
    }
  }

  // The next plane of the activations counts half as much as those before.
  __device__ void next_plane() {
#pragma unroll
    for (auto& plane : counts) {
      for (auto& strip : plane) {
        for (auto& slice : strip) {
          for (auto& count : slice) count <<= 1;
        }
      }
    }
  }

  // sum q_x u_w = 2 sum u_x u_w - centre sum u_w, from the sums over planes.
  __device__ int32_t sum(int strip, int slice, int c, int centre) const {
    uint32_t product = 0, all = 0;  // wrapping, as the final sum fits
#pragma unroll
    for (int j = 0; j < kBits; ++j) {
      product += static_cast<uint32_t>(counts[j][strip][slice][c]) << j;
      all += static_cast<uint32_t>(ones[j][strip][c]) << j;
    }
    return static_cast<int32_t>(2 * product - centre * all);
  }

 private:
  // Word `word` of each plane, the least significant first, of two columns.
  template <typename Stage>
  __device__ static void read_planes(const Stage& stage, int word, int strip,
                                     uint32_t (&planes)[kBits][2]) {
    uint32_t fields[2][kBits];
#pragma unroll
    for (int field = 0; field < kBits; ++field) {
      uint2 x = stage.columns(field * block_words(Method::kPlanes) + word, strip);
      fields[0][field] = x.x, fields[1][field] = x.y;
    }
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      fields_to_planes<kBits>(fields[column]);
#pragma unroll
      for (int j = 0; j < kBits; ++j) planes[j][column] = fields[column][j];
    }
  }
};

}  // namespace anyprec::cuda

// How one block of weights and activations in shared memory is multiplied: an engine for each
// method. Weights are the 16-row operand of the instructions and activations the 8-column one.
//
// Lane 4 g + q of a warp reads the words of columns 4 g .. 4 g + 3 of a unit of 32, so they are rows
// g and g + 8 of two operands ("halves"). A result of two halves, t[half][c], is then that of
// column 4 g + 2 half + c / 2 and row 2 q + c % 2.
#pragma once

#include "fields.cuh"
#include "ptx.cuh"
#include "tiles.h"

namespace anyprec::cuda {

// What a lane reads of a stage: its four columns of a unit, and its rows of activations.
template <int kRowBytes>
struct Stage {
  const uint8_t* weights;      // of the lane's columns, first unit
  const uint8_t* activations;  // of the lane's row in the first slice

  __device__ uint4 columns(int row, int unit) const {
    return *reinterpret_cast<const uint4*>(weights + row * kRowBytes + unit * 128);
  }
  __device__ uint2 half_columns(int row, int unit, int half) const {
    return *reinterpret_cast<const uint2*>(weights + row * kRowBytes + unit * 128 + half * 8);
  }
  __device__ uint4 values(int slice) const {
    return *reinterpret_cast<const uint4*>(activations + slice * 8 * kBlockBytes);
  }
};

// The 16-row operand of one half from words lo[4], hi[4] of four columns: the four columns' first
// and second registers.
struct Operand {
  uint32_t a[4];
};
__device__ inline Operand operand(int half, const uint32_t (&lo)[4], const uint32_t (&hi)[4]) {
  return {{lo[2 * half], lo[2 * half + 1], hi[2 * half], hi[2 * half + 1]}};
}

// --- 8-bit codes: exact sums of signed bytes by unsigned codes ---

template <int kBits, int kUnits, int kSlices>
struct CodesEngine {
  static constexpr int kWords = block_words(Method::kCodes);
  using Value = int32_t;

  Value t[kUnits][kSlices][2][4];

  template <typename Stage>
  __device__ void multiply(int q, const Stage& stage, const uint4 (&x)[kSlices], int word) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t lo[4], hi[4];
      read_quads<kBits, 0>(
          q, [&](int field) { return stage.columns(word * kBits + field, u); }, lo, hi);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Operand w = operand(half, lo, hi);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          mma_bytes(t[u][s][half], w.a, word ? x[s].z : x[s].x, word ? x[s].w : x[s].y);
        }
      }
    }
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

template <int kBits, int kUnits, int kSlices>
struct FloatEngine {
  static constexpr int kWords = block_words(Method::kFloat);
  using Value = float;

  Value t[kUnits][kSlices][2][4];

  template <typename Stage>
  __device__ void multiply(int q, const Stage& stage, const uint4 (&x)[kSlices], int) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t quads[2][4];
      read_quads<kBits, (kBits <= 6)>(
          q, [&](int field) { return stage.columns(field, u); }, quads[0], quads[1]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t even[4], odd[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          even[i] = odd_integers<kBits>(quads[h][i], 0);
          odd[i] = odd_integers<kBits>(quads[h][i], 1);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Operand w = operand(half, even, odd);
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            mma_bfloat(t[u][s][half], w.a, h ? x[s].z : x[s].x, h ? x[s].w : x[s].y);
          }
        }
      }
    }
  }
};

// --- bit planes: a set of counts for each plane of the weights ---

template <int kBits, int kUnits, int kSlices>
struct PlanesEngine {
  static constexpr int kWords = block_words(Method::kPlanes);

  int32_t counts[kBits][kUnits][kSlices][2][4];
  int32_t ones[kBits][kUnits][2][4];  // set bits of the weights: a product by ones

  template <typename Stage>
  __device__ void multiply(int q, const Stage& stage, const uint4 (&x)[kSlices], bool count_ones) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int half = 0; half < 2; half += kHalves) {
          uint32_t lo[2 * kHalves][kBits], hi[2 * kHalves][kBits];
          read_planes(stage, 8 * step + q, u, half, lo);
          read_planes(stage, 8 * step + q + 4, u, half, hi);
#pragma unroll
          for (int i = 0; i < kHalves; ++i) {
#pragma unroll
            for (int j = 0; j < kBits; ++j) {
              Operand w = {{lo[2 * i][j], lo[2 * i + 1][j], hi[2 * i][j], hi[2 * i + 1][j]}};
#pragma unroll
              for (int s = 0; s < kSlices; ++s) {
                mma_and_popcount(counts[j][u][s][half + i], w.a, step ? x[s].z : x[s].x,
                                 step ? x[s].w : x[s].y);
              }
              if (count_ones) mma_and_popcount(ones[j][u][half + i], w.a, ~0u, ~0u);
            }
          }
        }
      }
    }
  }

  // The next plane of the activations counts half as much.
  __device__ void next_plane() {
#pragma unroll
    for (auto& plane : counts) {
      for (auto& unit : plane) {
        for (auto& slice : unit) {
          for (auto& half : slice) {
            for (auto& count : half) count <<= 1;
          }
        }
      }
    }
  }

  // sum q_x u_w = 2 sum u_x u_w - centre sum u_w, from the shifted sums over planes.
  __device__ int32_t sum(int u, int s, int half, int c, int centre) const {
    uint32_t product = 0, all = 0;  // wrapping, as the final sum fits
#pragma unroll
    for (int j = 0; j < kBits; ++j) {
      product += static_cast<uint32_t>(counts[j][u][s][half][c]) << j;
      all += static_cast<uint32_t>(ones[j][u][half][c]) << j;
    }
    return static_cast<int32_t>(2 * product - centre * all);
  }

 private:
  // Halves of a unit that are read at once: registers hold both up to 4 bits.
  static constexpr int kHalves = kBits <= 4 ? 2 : 1;

  template <typename Stage>
  __device__ static void read_planes(const Stage& stage, int word, int u, int half,
                                     uint32_t (&planes)[2 * kHalves][kBits]) {
#pragma unroll
    for (int field = 0; field < kBits; ++field) {
      int row = field * kWords + word;
      if constexpr (kHalves == 2) {
        uint4 x = stage.columns(row, u);
        planes[0][field] = x.x, planes[1][field] = x.y;
        planes[2][field] = x.z, planes[3][field] = x.w;
      } else {
        uint2 x = stage.half_columns(row, u, half);
        planes[0][field] = x.x, planes[1][field] = x.y;
      }
    }
#pragma unroll
    for (auto& column : planes) fields_to_planes<kBits>(column);
  }
};

}  // namespace anyprec::cuda

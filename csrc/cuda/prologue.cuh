// Activations of one row, by one block of threads: scale, round, sum, and lay out as the products
// read them (product.h). A "piece" is the 32 values of a word; four lanes have it. Results
// may lie in global memory, or in shared memory for a product in the same kernel.
#pragma once

#include <algorithm>

#include "activations.cuh"

namespace anyprec::cuda {

// What is made: one of the payloads of product.h, or codes one after another.
enum class Output { kPlanes, kCodes, kFloat, kPlain };

// Whether RMSNorm or SwiGLU may come before: in products of few rows, which have no planes.
constexpr bool is_fused(Output output) {
  return output == Output::kCodes || output == Output::kFloat;
}

// Bits of the largest magnitude of a lane's values: they are ordered as magnitudes, NaN last.
__device__ inline uint32_t largest_bits(const float (&v)[kValues]) {
  uint32_t largest = 0;
#pragma unroll
  for (float x : v) largest = max(largest, __float_as_uint(x) & 0x7fffffffu);
  return largest;
}

// absmax / act_max_level; 0 if too small, NaN if too large or not finite.
__device__ inline float absmax_scale(float absmax, int bits) {
  float scale = absmax * (1.0f / act_max_level(bits));
  if (!(scale <= kMaxScale)) return __int_as_float(0x7fffffff);
  return scale >= kMinScale ? scale : 0.0f;
}

// See encode() and act_encode() in jax_anyprec/format.py.
__device__ inline int encode(float x, float inverse, int bits) {
  int half = 1 << (bits - 1);
  float level = __fmul_rn(x, inverse), low = static_cast<float>(-half);
  if (bits >= kZeroBits) {
    level = rintf(level);
    low += 1;
  } else {
    level = fabsf(level) < kZeroLevel ? 0.0f : floorf(level);
  }
  level = level >= low ? level : low;  // also where level is NaN
  float high = static_cast<float>(half - 1);
  level = level <= high ? level : high;
  return static_cast<int>(level) + half;
}

// --- from pieces to groups: a warp for each group ---

// Turns the largest magnitudes in pieces[] into the scales of their groups, and keeps those.
template <Output kOutput>
__device__ inline void choose_scales(const Prologue& p, int row, float* pieces) {
  int lane = threadIdx.x % 32, warps = blockDim.x / 32, n = static_cast<int>(words(p.k));
  for (int g = threadIdx.x / 32; g < p.act_groups; g += warps) {
    int first = g * p.act_group_words, last = min(n, first + p.act_group_words);
    uint32_t largest = 0;
    for (int i = first + lane; i < last; i += 32) largest = max(largest, __float_as_uint(pieces[i]));
    largest = __reduce_max_sync(kAllLanes, largest);
    float absmax = p.peaks != nullptr ? p.peaks[row] : __uint_as_float(largest);
    float scale = absmax_scale(absmax, p.bits);
    for (int i = first + lane; i < last; i += 32) pieces[i] = scale;
    if (lane != 0) continue;
    if (kOutput == Output::kPlain) {
      p.scales[int64_t{row} * p.act_groups + g] = scale;
    } else {
      int unit = kOutput == Output::kCodes ? act_unit(p.bits) : 1;
      p.scales[int64_t{g} * p.m + row] = scale * unit;
    }
  }
}

template <typename T>
__device__ inline void sum_groups(const Prologue& p, int row, const T* pieces) {
  int lane = threadIdx.x % 32, warps = blockDim.x / 32, n = static_cast<int>(words(p.k));
  for (int g = threadIdx.x / 32; g < p.groups; g += warps) {
    int first = g * p.group_words, last = min(n, first + p.group_words);
    T sum = 0;
    for (int i = first + lane; i < last; i += 32) sum += pieces[i];
    sum = warp_sum(sum);
    if (lane == 0) static_cast<T*>(p.sums)[int64_t{g} * p.m + row] = sum;
  }
}

// --- laying out the eight values of a lane, which begin at index `at` ---

__device__ inline uint8_t* in_block(const Prologue& p, int row, int pass, int block) {
  return p.payload + ((int64_t{pass} * p.blocks + block) * p.m + row) * kBlockBytes;
}

__device__ inline void pack_bytes(const int (&x)[kValues], uint32_t& lo, uint32_t& hi) {
  lo = hi = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    lo |= (x[i] & 0xffu) << (8 * i);
    hi |= (x[i + 4] & 0xffu) << (8 * i);
  }
}

__device__ inline void store_codes(const Prologue& p, int row, int at, int lane,
                                   const int (&x)[kValues]) {
  uint32_t lo, hi;
  pack_bytes(x, lo, hi);
  lo = transpose_bytes(lo, lane), hi = transpose_bytes(hi, lane);
  int block = at / 64;
  if (block >= p.blocks) return;
  auto* to = in_block(p, row, 0, block) + 16 * (lane % 4) + 8 * (at / 32 % 2);
  *reinterpret_cast<uint2*>(to) = make_uint2(lo, hi);
}

__device__ inline void store_planes(const Prologue& p, int row, int at, int lane,
                                   const int (&u)[kValues]) {
  uint32_t x[2];
  pack_bytes(u, x[0], x[1]);
  transpose_bits(x[0], x[1]);
  int word = at / kWordBits, block = word / 16, in = word % 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x[i] = transpose_bytes(x[i], lane);
    int bit = 4 * i + lane % 4;
    if (block >= p.blocks || bit >= p.bits) continue;
    auto* to = in_block(p, row, p.bits - 1 - bit, block) + 16 * (in % 4) + 4 * (in / 4);
    *reinterpret_cast<uint32_t*>(to) = x[i];
  }
}

__device__ inline void store_plain(const Prologue& p, int row, int at, const int (&u)[kValues]) {
  uint8_t* to = p.payload + int64_t{row} * p.k + at;
  if (p.k % kValues == 0 && at < p.k) {
    uint2 packed;
    pack_bytes(u, packed.x, packed.y);
    *reinterpret_cast<uint2*>(to) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (at + i < p.k) to[i] = static_cast<uint8_t>(u[i]);
  }
}

// Parts of the upper 16 bits of a float each, which leaves the rest exact.
__device__ inline void store_floats(const Prologue& p, int row, int at, int lane,
                                    float (&v)[kValues]) {
  int block = at / kWordBits;
  for (int part = 0; part < p.bits; ++part) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t first = __float_as_uint(v[i]) & 0xffff0000u;
      uint32_t second = __float_as_uint(v[i + 4]) & 0xffff0000u;
      x[i] = (first >> 16) | second;
      v[i] -= __uint_as_float(first), v[i + 4] -= __uint_as_float(second);
    }
    transpose_words(x, lane);
    if (block >= p.blocks) continue;
    *reinterpret_cast<uint4*>(in_block(p, row, part, block) + 16 * (lane % 4)) =
        make_uint4(__byte_perm(x[0], x[2], 0x5410), __byte_perm(x[1], x[3], 0x5410),
                   __byte_perm(x[0], x[2], 0x7632), __byte_perm(x[1], x[3], 0x7632));
  }
}

// A token with a NaN or an infinity gives NaN.
__device__ inline float finite_or_nan(float x) {
  return fabsf(x) <= 0x1.fffffep127f ? x : __int_as_float(0x7fffffff);
}

// --- a row ---

__device__ inline void lay_out_floats(const Prologue& p, int row, int first, int lane, Chunk& v,
                                      float* pieces) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    int at = index_of(first, r, lane);
    float sum = 0;
#pragma unroll
    for (float& x : v[r]) {
      x = finite_or_nan(x);
      sum += x;
    }
    sum = quad_sum(sum);
    if (lane % 4 == 0 && at < p.k) pieces[at / kWordBits] = sum;
    store_floats(p, row, at, lane, v[r]);
  }
}

// Codes: of floats whose scales are in pieces[], or the bytes at p.x themselves.
template <Output kOutput, bool kGiven>
__device__ inline void lay_out_codes(const Prologue& p, int row, int first, int lane,
                                     const Chunk& v, float* pieces) {
  int centre = act_centre(p.bits);
  auto* given = static_cast<const uint8_t*>(p.x) + int64_t{row} * p.k;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    int at = index_of(first, r, lane), piece = at / kWordBits;
    float inverse = 0;
    if (!kGiven && at < p.k) {
      float scale = pieces[piece];
      inverse = scale >= kMinScale && scale <= kMaxScale ? 0.5f / scale : 0.0f;
    }
    int x[kValues], sum = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      bool inside = at + i < p.k;
      int u = !kGiven  ? encode(v[r][i], inverse, p.bits)
              : inside ? given[at + i] & max_level(p.bits)
                       : 0;
      int q = inside ? 2 * u - centre : 0;
      if (kOutput == Output::kCodes) q /= act_unit(p.bits);
      sum += q;
      x[i] = kOutput == Output::kCodes ? q : inside ? u : 0;
    }
    if constexpr (kOutput == Output::kPlain) {
      store_plain(p, row, at, x);
    } else {
      sum = quad_sum(sum);
      __syncwarp();  // the lanes of a piece have all read its scale
      if (lane % 4 == 0 && at < p.k) pieces[piece] = __int_as_float(sum);
      if constexpr (kOutput == Output::kCodes) {
        store_codes(p, row, at, lane, x);
      } else {
        store_planes(p, row, at, lane, x);
      }
    }
  }
}

// Largest magnitudes of pieces.
__device__ inline void find_largest(const Prologue& p, int first, int lane, const Chunk& v,
                                    float* pieces) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    uint32_t largest = largest_bits(v[r]);
    largest = max(largest, from_lane_across(largest, 1));
    largest = max(largest, from_lane_across(largest, 2));
    int at = index_of(first, r, lane);
    if (lane % 4 == 0 && at < p.k) pieces[at / kWordBits] = __uint_as_float(largest);
  }
}

// Lays out one row. `pieces` are words(k) floats of shared memory. With `kEight` k must be a multiple
// of eight.
template <Output kOutput, bool kGiven, bool kEight>
__device__ inline void lay_out_row(const Prologue& p, int row, float* pieces) {
  int lane = threadIdx.x % 32, step = blockDim.x / 32 * kChunk;
  int mine = threadIdx.x / 32 * kChunk;
  constexpr int kBlockValues = kOutput == Output::kPlanes ? 512 : kOutput == Output::kCodes ? 64 : 32;
  int end = kOutput == Output::kPlain ? p.k : p.blocks * kBlockValues;
  constexpr bool kFused = is_fused(kOutput) && !kGiven;
  float root = 1;
  if constexpr (kFused) {
    if (p.before == Before::kRmsNorm) root = inverse_rms<kEight>(p, row, pieces);
  }
  Chunk v;
  int held = -1;  // first index of the chunk in v
  constexpr bool kScaled = kOutput != Output::kFloat && !kGiven;
#pragma unroll 1  // scales first, where there are any, with the same code that reads values
  for (int pass = kScaled ? 0 : 1; pass < 2; ++pass) {
    for (int first = mine; first < end; first += step) {
      // Rows that fit the registers are read once.
      if (!kGiven && first != held) load_activations<kFused, kEight>(p, row, root, first, lane, v);
      held = first;
      if (pass == 0) {
        find_largest(p, first, lane, v, pieces);
      } else if constexpr (kOutput == Output::kFloat) {
        lay_out_floats(p, row, first, lane, v, pieces);
      } else {
        lay_out_codes<kOutput, kGiven>(p, row, first, lane, v, pieces);
      }
    }
    if (pass != 0) break;
    __syncthreads();
    choose_scales<kOutput>(p, row, pieces);
    __syncthreads();
  }
  if (kOutput == Output::kPlain || p.sums == nullptr) return;
  __syncthreads();
  if constexpr (kOutput == Output::kFloat) {
    sum_groups(p, row, pieces);
  } else {
    sum_groups(p, row, reinterpret_cast<const int*>(pieces));
  }
}

}  // namespace anyprec::cuda

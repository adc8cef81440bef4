// Activations of a row as they go into a product: read from memory, normalized or gated, rotated.
#pragma once

#include <algorithm>

#include "lanes.cuh"
#include "ptx.cuh"
#include "values.cuh"

namespace anyprec::cuda {

constexpr int kRuns = 4;                      // of a lane's values, 256 apart
constexpr int kChunk = 32 * kValues * kRuns;  // values of a warp, and the longest Hadamard block
using Chunk = float[kRuns][kValues];

// Index of the first value of a lane's run in the chunk that begins at `first`.
__device__ inline int index_of(int first, int run, int lane) {
  return first + (run * 32 + lane) * kValues;
}

// A chunk of a row of k values, zeros past k. No branch lies between the reads of its runs, so that
// all are under way at once. With `kEight` k must be a multiple of eight.
template <bool kEight, typename T>
__device__ inline void load_chunk(const T* x, bool half, int k, int first, int lane, Chunk& v) {
  constexpr int kWidth = std::min<int>(kValues, 16 / sizeof(T)), kPacks = kValues / kWidth;
  Pack<T, kWidth> packs[kRuns][kPacks] = {};
  bool aligned = kEight || k % kValues == 0;  // rows begin and end with eight
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    int at = index_of(first, r, lane);
    if (!aligned || at >= k) continue;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      packs[r][i] = *reinterpret_cast<const Pack<T, kWidth>*>(x + at + i * kWidth);
    }
  }
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kRuns * kValues; ++i) {
      int at = index_of(first, i / kValues, lane) + i % kValues;
      T value = x[min(at, k - 1)];
      packs[i / kValues][i % kValues / kWidth].x[i % kWidth] = at < k ? value : T{};
    }
  }
#pragma unroll
  for (int i = 0; i < kRuns * kValues; ++i) {
    v[i / kValues][i % kValues] =
        to_float(packs[i / kValues][i % kValues / kWidth].x[i % kWidth], half);
  }
}

// Of row `row` of `rows`.
template <bool kEight>
__device__ inline void load_row(DType dtype, const void* rows, int row, int k, int first, int lane,
                                Chunk& v) {
  with_values(dtype, rows, [&](auto* x, bool half) {
    load_chunk<kEight>(x + int64_t{row} * k, half, k, first, lane, v);
  });
}

// --- before all else: RMSNorm or SwiGLU, as jax_anyprec/before.py defines them ---

// 1 / sqrt(mean of squares + eps) of a row, in all threads of the block. `sums` is a float of
// shared memory for each warp that has values.
template <bool kEight>
__device__ inline float inverse_rms(const Prologue& p, int row, float* sums) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float sum = 0;
  for (int first = warp * kChunk; first < p.k; first += warps * kChunk) {
    Chunk v;
    load_row<kEight>(p.dtype, p.x, row, p.k, first, lane, v);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      int at = index_of(first, r, lane);
      if (at < p.k) prefetch(p.norm_scale + at);  // they are next
#pragma unroll
      for (float x : v[r]) sum = fmaf(x, x, sum);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0 && warp * kChunk < p.k) sums[warp] = sum;
  __syncthreads();
  float all = 0;
  for (int i = 0; i < warps && i * kChunk < p.k; ++i) all += sums[i];
  __syncthreads();  // all have read them
  return rsqrtf(all / static_cast<float>(p.k) + p.eps);
}

// x / (1 + exp(-x)), less than 2^-121 off where the exponential overflows.
__device__ inline float silu(float x) { return x * reciprocal(1.0f + expf(-x)); }

// Replaces each value by f(value, run, index in the run).
template <typename F>
__device__ inline void for_values(Chunk& v, const F& f) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[r][i] = f(v[r][i], r, i);
  }
}

// Rounds values to a type, as if they were stored and read again.
__device__ inline void round_to(DType dtype, Chunk& v) {
  if (dtype == DType::kF32) return;
  bool half = dtype == DType::kF16;
  for_values(v, [half](float x, int, int) {
    uint16_t stored;
    from_float(x, half, stored);
    return to_float(stored, half);
  });
}

// Turns values of a row, which before kSwiGlu are its gates, into what goes into the product. `root`
// is inverse_rms() of the row. No multiplication is fused with what follows: the result is rounded.
template <bool kEight>
__device__ inline void apply_before(const Prologue& p, int row, float root, int first, int lane,
                                    Chunk& v) {
  bool gated = p.before == Before::kSwiGlu;
  Chunk by;
  load_row<kEight>(gated ? p.dtype : DType::kF32, gated ? p.x : p.norm_scale,
                   gated ? 2 * row + 1 : 0, p.k, first, lane, by);
  if (gated) {
    for_values(v, [&](float x, int r, int i) { return __fmul_rn(silu(x), by[r][i]); });
  } else {
    for_values(v, [&](float x, int r, int i) { return __fmul_rn(x, __fmul_rn(root, by[r][i])); });
  }
  round_to(p.dtype, v);
  for_values(v, [&](float x, int r, int i) {
    return index_of(first, r, lane) + i < p.k ? x : 0.0f;  // a root may be infinite
  });
}

// --- rotations ---

// Sums and differences of values of a lane that are `kApart` apart: runs, or values of a run.
template <int kApart, bool kOfRuns>
__device__ inline void butterfly(Chunk& v) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if ((kOfRuns ? r : i) & kApart) continue;
      float& a = v[r][i];
      float& b = kOfRuns ? v[r + kApart][i] : v[r][i + kApart];
      float difference = a - b;
      a += b, b = difference;
    }
  }
}

// Those of lanes `apart` apart.
__device__ inline void butterfly_of_lanes(Chunk& v, int lane, int apart) {
  uint32_t sign = lane & apart ? 0x80000000u : 0;
#pragma unroll
  for (auto& run : v) {
    for (float& x : run) {
      x = from_lane_across(x, apart) + __uint_as_float(__float_as_uint(x) ^ sign);
    }
  }
}

// Rounds of 1, 2, 4 and so on to half a block, in the format's order.
__device__ inline void hadamard(Chunk& v, int lane, int block, float norm) {
  butterfly<1, false>(v), butterfly<2, false>(v), butterfly<4, false>(v);
#pragma unroll 1
  for (int apart = 1; apart < 32 && apart * kValues < block; apart *= 2) {
    butterfly_of_lanes(v, lane, apart);
  }
  if (block > 256) butterfly<1, true>(v);
  if (block > 512) butterfly<2, true>(v);
#pragma unroll
  for (auto& run : v) {
    // Never fused with what follows: results are the same bits everywhere.
    for (float& x : run) x = __fmul_rn(x, norm);
  }
}

__device__ inline void rotate(const Prologue& p, int first, int lane, Chunk& v) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    int at = index_of(first, r, lane);
    if (at >= p.k) continue;
    uint32_t signs = p.signs[at / kWordBits] >> (at % kWordBits);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      v[r][i] = __uint_as_float(__float_as_uint(v[r][i]) ^ ((signs >> i) << 31));
    }
  }
  hadamard(v, lane, p.block, p.norm);
}

// A chunk of a row of activations, zeros past k. With `kFused` p.before is heeded.
template <bool kFused, bool kEight>
__device__ inline void load_activations(const Prologue& p, int row, float root, int first, int lane,
                                        Chunk& v) {
  bool gated = kFused && p.before == Before::kSwiGlu;
  load_row<kEight>(p.dtype, p.x, gated ? 2 * row : row, p.k, first, lane, v);
  if (kFused && p.before != Before::kNone) apply_before<kEight>(p, row, root, first, lane, v);
  if (p.block != 0) rotate(p, first, lane, v);
}

}  // namespace anyprec::cuda

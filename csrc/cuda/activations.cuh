// Activations of a row as they go into a product: read from memory, normalized or gated, rotated.
#pragma once

#include <algorithm>

#include "lanes.cuh"
#include "ptx.cuh"
#include "values.cuh"

namespace anyprec::cuda {

constexpr int kValues = 8;            // neighbours in a lane
constexpr int kRuns = 4;              // of them, 256 apart
constexpr int kChunk = 32 * kValues * kRuns;  // values of a warp, and the longest Hadamard block
using Chunk = float[kRuns][kValues];

// Index of the first value of a lane's run in the chunk that begins at `first`.
__device__ inline int index_of(int first, int run, int lane) {
  return first + (run * 32 + lane) * kValues;
}

// A chunk of row `row` of rows of k values, zeros past k. No branch lies between the reads of its
// runs, so that all are under way at once.
__device__ inline void load_chunk(DType dtype, const void* rows, int row, int k, int first,
                                  int lane, Chunk& v) {
  with_dtype(dtype, rows, [&](auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    x += int64_t{row} * k;
    if (k % kValues == 0) {  // rows are aligned, and end with eight
      constexpr int kWidth = std::min<int>(kValues, 16 / sizeof(T)), kPacks = kValues / kWidth;
      Pack<T, kWidth> packs[kRuns][kPacks] = {};
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        int at = index_of(first, r, lane);
        if (at >= k) continue;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          packs[r][i] = *reinterpret_cast<const Pack<T, kWidth>*>(x + at + i * kWidth);
        }
      }
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) v[r][i] = to_float(packs[r][i / kWidth].x[i % kWidth]);
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      int at = index_of(first, r, lane);
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[r][i] = at + i < k ? to_float(x[at + i]) : 0.0f;
    }
  });
}

// --- before all else: RMSNorm or SwiGLU, as jax_anyprec/before.py defines them ---

// 1 / sqrt(mean of squares + eps) of a row, in all threads of the block. `sums` is a float of
// shared memory for each warp that has values.
__device__ inline float inverse_rms(const Prologue& p, int row, float* sums) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float sum = 0;
  for (int first = warp * kChunk; first < p.k; first += warps * kChunk) {
    Chunk v;
    load_chunk(p.dtype, p.x, row, p.k, first, lane, v);
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

// x rounded to a type, as a value that is stored and read again.
__device__ inline float rounded(DType dtype, float x) {
  switch (dtype) {
    case DType::kF16: return to_float(__float2half_rn(x));
    case DType::kBF16: return to_float(__float2bfloat16_rn(x));
    default: return x;
  }
}

// Turns values of a row, which before kSwiGlu are its gates, into what goes into the product. `root`
// is inverse_rms() of the row. No multiplication is fused with what follows: the result is rounded.
__device__ inline void apply_before(const Prologue& p, int row, float root, int first, int lane,
                                    Chunk& v) {
  bool gated = p.before == Before::kSwiGlu;
  Chunk by;
  if (gated) {
    load_chunk(p.dtype, p.x, 2 * row + 1, p.k, first, lane, by);
  } else {
    load_chunk(DType::kF32, p.norm_scale, 0, p.k, first, lane, by);
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    int at = index_of(first, r, lane);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      float y = gated ? __fmul_rn(silu(v[r][i]), by[r][i])
                      : __fmul_rn(v[r][i], __fmul_rn(root, by[r][i]));
      v[r][i] = at + i < p.k ? rounded(p.dtype, y) : 0.0f;  // a root may be infinite
    }
  }
}

// --- rotations ---

// One round: sums and differences of values `kDistance` apart. The order of rounds is the format's.
template <int kDistance>
__device__ inline void butterfly(Chunk& v, int lane) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if constexpr (kDistance < kValues) {
        if (i & kDistance) continue;
        float a = v[r][i], b = v[r][i + kDistance];
        v[r][i] = a + b, v[r][i + kDistance] = a - b;
      } else if constexpr (kDistance < 32 * kValues) {
        constexpr int kLanes = kDistance / kValues;
        float other = from_lane_across(v[r][i], kLanes);
        v[r][i] = lane & kLanes ? other - v[r][i] : v[r][i] + other;
      } else {
        constexpr int kApart = kDistance / (32 * kValues);
        if (r & kApart) continue;
        float a = v[r][i], b = v[r + kApart][i];
        v[r][i] = a + b, v[r + kApart][i] = a - b;
      }
    }
  }
}

__device__ inline void hadamard(Chunk& v, int lane, int block, float norm) {
  butterfly<1>(v, lane), butterfly<2>(v, lane), butterfly<4>(v, lane);
  butterfly<8>(v, lane), butterfly<16>(v, lane), butterfly<32>(v, lane);
  if (block > 64) butterfly<64>(v, lane);
  if (block > 128) butterfly<128>(v, lane);
  if (block > 256) butterfly<256>(v, lane);
  if (block > 512) butterfly<512>(v, lane);
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
template <bool kFused>
__device__ inline void load_activations(const Prologue& p, int row, float root, int first, int lane,
                                        Chunk& v) {
  bool gated = kFused && p.before == Before::kSwiGlu;
  load_chunk(p.dtype, p.x, gated ? 2 * row : row, p.k, first, lane, v);
  if (kFused && p.before != Before::kNone) apply_before(p, row, root, first, lane, v);
  if (p.block != 0) rotate(p, first, lane, v);
}

}  // namespace anyprec::cuda

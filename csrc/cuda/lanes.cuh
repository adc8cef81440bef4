// Exchanges between the four lanes of a quad, and between all lanes of a warp.
#pragma once

#include <cstdint>

namespace anyprec::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

template <typename T>
__device__ inline T from_lane_across(T x, int distance) {
  return __shfl_xor_sync(kAllLanes, x, distance);
}

// Byte j of lane i becomes byte i of lane j.
__device__ inline uint32_t transpose_bytes(uint32_t x, int lane) {
  uint32_t other = from_lane_across(x, 1);
  x = __byte_perm(x, other, lane & 1 ? 0x3715 : 0x6240);
  other = from_lane_across(x, 2);
  return __byte_perm(x, other, lane & 2 ? 0x3276 : 0x5410);
}

// Word j of lane i becomes word i of lane j.
__device__ inline void transpose_words(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t got = from_lane_across(lane & 1 ? x[i] : x[i + 1], 1);
    (lane & 1 ? x[i] : x[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t got = from_lane_across(lane & 2 ? x[i] : x[i + 2], 2);
    (lane & 2 ? x[i] : x[i + 2]) = got;
  }
}

// Bit j of byte i becomes bit i of byte j, of the eight bytes lo, hi (Warren, Hacker's Delight, 7-3).
__device__ inline void transpose_bits(uint32_t& lo, uint32_t& hi) {
  uint64_t x = (uint64_t{hi} << 32) | lo;
  auto swap = [&](int distance, uint64_t mask) {
    uint64_t differ = (x ^ (x >> distance)) & mask;
    x ^= differ ^ (differ << distance);
  };
  swap(7, 0x00aa00aa00aa00aaull);
  swap(14, 0x0000cccc0000ccccull);
  swap(28, 0x00000000f0f0f0f0ull);
  lo = static_cast<uint32_t>(x);
  hi = static_cast<uint32_t>(x >> 32);
}

// Sum over the lanes of a quad, or over a warp.
template <typename T>
__device__ inline T quad_sum(T x) {
  x += from_lane_across(x, 1);
  return x + from_lane_across(x, 2);
}
template <typename T>
__device__ inline T warp_sum(T x) {
  for (int distance = 16; distance > 0; distance /= 2) x += from_lane_across(x, distance);
  return x;
}

}  // namespace anyprec::cuda

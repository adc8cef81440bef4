// Floats of the three types in memory, to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "product.h"

namespace anyprec::cuda {

// Values as they lie in memory are float, or uint16_t for a float16 if `half` and a bfloat16 if not:
// so code that reads or writes is there twice, not once for each type.
__device__ inline float to_float(float x, bool) { return x; }
__device__ inline float to_float(uint16_t x, bool half) {
  return half ? __half2float(__ushort_as_half(x)) : __uint_as_float(uint32_t{x} << 16);
}

__device__ inline void from_float(float x, bool, float& out) { out = x; }
__device__ inline void from_float(float x, bool half, uint16_t& out) {
  out = half ? __half_as_ushort(__float2half_rn(x)) : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Calls f with p as a pointer to values of `dtype` as they lie in memory, and with `half`.
template <typename F>
__device__ inline void with_values(DType dtype, const void* p, F&& f) {
  if (dtype == DType::kF32) {
    f(static_cast<const float*>(p), false);
  } else {
    f(static_cast<const uint16_t*>(p), dtype == DType::kF16);
  }
}

// `kCount` neighbours, read and written as one.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T x[kCount];
};

// kCount floats from element `at`, a multiple of kCount.
template <int kCount>
__device__ inline void load_pack(DType dtype, const void* p, int64_t at, float (&out)[kCount]) {
  with_values(dtype, p, [&](auto* values, bool half) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    auto pack = *reinterpret_cast<const Pack<T, kCount>*>(values + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_float(pack.x[i], half);
  });
}

// The float at element `at`.
__device__ inline float load(DType dtype, const void* p, int64_t at) {
  float x[1];
  load_pack(dtype, p, at, x);
  return x[0];
}

// x[0 .. count - 1] to p[at ..], at once if they are all and `aligned`.
template <int kCount>
__device__ inline void store_pack(DType dtype, void* p, int64_t at, const float (&x)[kCount],
                                  int count, bool aligned) {
  with_values(dtype, p, [&](auto* values, bool half) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    T* out = const_cast<T*>(values) + at;
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_float(x[i], half, pack.x[i]);
    if (aligned && count == kCount) {
      *reinterpret_cast<Pack<T, kCount>*>(out) = pack;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) out[i] = pack.x[i];
    }
  });
}

}  // namespace anyprec::cuda

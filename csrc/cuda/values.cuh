// Floats of the three types in memory, to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "product.h"

namespace anyprec::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void from_float(float x, float& out) { out = x; }
__device__ inline void from_float(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// Calls f with a typed pointer for `dtype`.
template <typename F>
__device__ inline void with_dtype(DType dtype, const void* p, F&& f) {
  switch (dtype) {
    case DType::kF16: return f(static_cast<const __half*>(p));
    case DType::kBF16: return f(static_cast<const __nv_bfloat16*>(p));
    default: return f(static_cast<const float*>(p));
  }
}

// The float at element `at`.
__device__ inline float load(DType dtype, const void* p, int64_t at) {
  float x = 0;
  with_dtype(dtype, p, [&](auto* typed) { x = to_float(typed[at]); });
  return x;
}

// `kCount` neighbours, read and written as one.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T x[kCount];
};

// kCount floats from element `at`, a multiple of kCount.
template <int kCount>
__device__ inline void load_pack(DType dtype, const void* p, int64_t at, float (&out)[kCount]) {
  with_dtype(dtype, p, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    auto pack = *reinterpret_cast<const Pack<T, kCount>*>(typed + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_float(pack.x[i]);
  });
}

// x[0 .. count - 1] to p[at ..], at once if they are all and `aligned`.
template <int kCount>
__device__ inline void store_pack(DType dtype, void* p, int64_t at, const float (&x)[kCount],
                                  int count, bool aligned) {
  with_dtype(dtype, p, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    T* out = const_cast<T*>(typed) + at;
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_float(x[i], pack.x[i]);
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

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

// Four neighbours, as wide as memory gives them; `at` is a multiple of 4.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

__device__ inline void load_four(DType dtype, const void* p, int64_t at, float (&out)[4]) {
  with_dtype(dtype, p, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    Four<T> four = *reinterpret_cast<const Four<T>*>(typed + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(four.x[i]);
  });
}

// x[0 .. count - 1] to p[at ..], in one piece if they are four and `aligned`.
__device__ inline void store_four(DType dtype, void* p, int64_t at, const float (&x)[4], int count,
                                  bool aligned) {
  with_dtype(dtype, p, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    T* out = const_cast<T*>(typed) + at;
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) from_float(x[i], four.x[i]);
    if (aligned && count == 4) {
      *reinterpret_cast<Four<T>*>(out) = four;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) out[i] = four.x[i];
    }
  });
}

}  // namespace anyprec::cuda

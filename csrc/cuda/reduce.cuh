// The parts of a split product, their sum, bias, residual and cast.
#pragma once

#include "ptx.cuh"
#include "values.cuh"

namespace anyprec::cuda {

__device__ inline void reduce(const Reduce& p) {
  wait_for_launch_before();
  int64_t at = (int64_t{blockIdx.x} * kReduceThreads + threadIdx.x) * 4;
  if (at >= p.count) return;
  int count = p.count - at < 4 ? static_cast<int>(p.count - at) : 4;
  bool aligned = p.count % 4 == 0;
  float y[4] = {};
  for (int split = 0; split < p.splits; ++split) {
    const float* part = p.parts + split * p.count + at;
    float x[4] = {};
    if (aligned) {
      load_pack(DType::kF32, part, 0, x);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = i < count ? part[i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += x[i];
  }
  if (p.bias != nullptr) {
    with_values(p.bias_dtype, p.bias, [&](auto* bias, bool half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] += i < count ? to_float(bias[(at + i) % p.n], half) : 0.0f;
    });
  }
  if (p.residual != nullptr) {
    with_values(p.residual_dtype, p.residual, [&](auto* residual, bool half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] += i < count ? to_float(residual[at + i], half) : 0.0f;
    });
  }
  store_pack(p.out_dtype, p.out, at, y, count, aligned);
}

}  // namespace anyprec::cuda

// Each kernel twice: with a mistake (name_bad) and without it (name_good).
#pragma once

#include <cstdint>

struct Params {
  const uint32_t* x;  // 256 words
  uint32_t* y;        // 256 words
  int n;              // 256
};

#define KERNEL(name)                                                               \
  template <bool kBad>                                                             \
  __device__ void name(const Params& p, int t);                                    \
  extern "C" __global__ void name##_bad(const __grid_constant__ Params p) {        \
    name<true>(p, threadIdx.x);                                                    \
  }                                                                                \
  extern "C" __global__ void name##_good(const __grid_constant__ Params p) {       \
    name<false>(p, threadIdx.x);                                                   \
  }                                                                                \
  template <bool kBad>                                                             \
  __device__ void name(const Params& p, int t)

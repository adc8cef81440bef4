// C[m, n] = sum over k of A[m, k] B[n, k] of int8: 64 x 64 outputs a CTA, 64 bytes of K a stage,
// three stages of cp.async, ldmatrix on swizzled rows, and the last CTA of a column adds bias.
#include <cstdint>

#include "mma.cuh"

struct Gemm {
  const int8_t* a;  // [m, k], k a multiple of 16
  const int8_t* b;  // [n, k]
  int32_t* c;       // [m, n], set to zero: CTAs along z add parts of K
  int m, n, k;
};

constexpr int kTile = 64, kDepth = 64, kStages = 3, kStageBytes = 2 * kTile * kDepth;

extern __shared__ __align__(128) uint8_t stages[];

// Bytes into a tile: 16-byte units of a row are exchanged so that 8 rows lie in different banks.
__device__ uint32_t place(int row, int unit) {
  return row * kDepth + ((unit ^ (row / 2)) & 3) * 16;
}

__device__ void fetch(uint32_t tile, const int8_t* from, int first, int rows, int start, int k) {
  for (int i = threadIdx.x; i < kTile * kDepth / 16; i += 128) {
    int row = i / 4, unit = i % 4, column = start + unit * 16;
    bool inside = first + row < rows && column < k;
    const int8_t* source = inside ? from + (long long)(first + row) * k + column : from;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     tile + place(row, unit)),
                 "l"(source), "r"(inside ? 16 : 0)
                 : "memory");
  }
}

template <int kCount>
__device__ void ldmatrix(uint32_t (&r)[kCount], uint32_t address) {
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
}

extern "C" __global__ void __launch_bounds__(128) gemm(const __grid_constant__ Gemm p) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  int steps = (p.k + kDepth - 1) / kDepth;
  int first = steps * blockIdx.z / gridDim.z, last = steps * (blockIdx.z + 1) / gridDim.z;
  uint32_t base = __cvta_generic_to_shared(stages);
  uint32_t c[8][4] = {};

  auto start = [&](int step) {
    uint32_t stage = base + (step % kStages) * kStageBytes;
    if (step < last) {
      fetch(stage, p.a, m0, p.m, step * kDepth, p.k);
      fetch(stage + kTile * kDepth, p.b, n0, p.n, step * kDepth, p.k);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int i = 0; i < kStages - 1; i++) start(first + i);
  for (int step = first; step < last; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    start(step + kStages - 1);
    uint32_t stage = base + (step % kStages) * kStageBytes;
    for (int k = 0; k < kDepth / 32; k++) {
      uint32_t a[4];
      ldmatrix(a, stage + place(warp * 16 + lane % 16, 2 * k + lane / 16));
      for (int j = 0; j < 8; j++) {
        uint32_t b[2];
        ldmatrix(b, stage + kTile * kDepth + place(j * 8 + lane % 8, 2 * k + lane / 8 % 2));
        mma_s8(c[j], a, b);
      }
    }
  }
  for (int j = 0; j < 8; j++) {
    for (int i = 0; i < 4; i++) {
      int row = m0 + warp * 16 + lane / 4 + i / 2 * 8, column = n0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < p.m && column < p.n) atomicAdd(&p.c[row * p.n + column], (int)c[j][i]);
    }
  }
}

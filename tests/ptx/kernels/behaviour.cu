// What threads do together: control flow, warps, atomics, memories.
#include <cstdint>

struct Params {
  const uint32_t* x;
  uint32_t* y;
  int n;
};

__constant__ uint32_t powers[8] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000};
__device__ uint32_t counter = 5;

// A loop whose length differs by thread, with a rare block inside; all lanes meet for the vote.
extern "C" __global__ void loops(const __grid_constant__ Params p) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < p.x[t] % 16; i++) {
    if (__builtin_expect((i ^ t) % 7 == 3, 0)) {
      sum = sum * 3 + 1;
      if (sum > 100000) break;
    }
    sum += i;
  }
  uint32_t odd = __ballot_sync(0xFFFFFFFF, sum & 1);
  p.y[2 * t] = sum;
  p.y[2 * t + 1] = odd;
}

extern "C" __global__ void cases(const __grid_constant__ Params p) {
  int t = threadIdx.x;
  uint32_t v = p.x[t], r;
  switch (v % 9) {
    case 0: r = v + 1; break;
    case 1: r = v * 7; break;
    case 2: r = v ^ 0x55; break;
    case 3: r = v >> 3; break;
    case 4: r = p.x[v % 32]; break;
    case 5: r = ~v; break;
    case 6: r = __popc(v); break;
    default: r = 0;
  }
  p.y[t] = r + __shfl_sync(0xFFFFFFFF, r, 5);
}

// Threads past n leave early; a block of 3 dimensions and no whole number of warps.
extern "C" __global__ void indices(const __grid_constant__ Params p) {
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int t = cta * (blockDim.x * blockDim.y * blockDim.z) + thread;
  if (t >= p.n) return;
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  p.y[t] = cta << 16 | threadIdx.z << 12 | threadIdx.y << 8 | threadIdx.x << 4 | (lane == thread % 32);
}

// Every shuffle, in whole warps and in segments of 8 lanes.
extern "C" __global__ void shuffles(const __grid_constant__ Params p) {
  int t = threadIdx.x;
  uint32_t v = p.x[t], *y = p.y + 8 * t;
  y[0] = __shfl_sync(0xFFFFFFFF, v, t * 7);
  y[1] = __shfl_up_sync(0xFFFFFFFF, v, 3);
  y[2] = __shfl_down_sync(0xFFFFFFFF, v, 5);
  y[3] = __shfl_xor_sync(0xFFFFFFFF, v, 9);
  y[4] = __shfl_sync(0xFFFFFFFF, v, t * 3, 8);
  y[5] = __shfl_up_sync(0xFFFFFFFF, v, 3, 8);
  y[6] = __shfl_down_sync(0xFFFFFFFF, v, 5, 8);
  uint32_t inside;
  asm volatile("{ .reg .pred q; .reg .b32 r; shfl.sync.down.b32 r|q, %1, 5, 31, -1;\n"
               " selp.u32 %0, 1, 0, q; }" : "=r"(inside) : "r"(v));
  y[7] = inside;
}

extern "C" __global__ void votes(const __grid_constant__ Params p) {
  int t = threadIdx.x;
  uint32_t v = p.x[t], *y = p.y + 8 * t;
  y[0] = __ballot_sync(0xFFFFFFFF, v & 1);
  y[1] = __any_sync(0xFFFFFFFF, v % 64 == 5);
  y[2] = __all_sync(0xFFFFFFFF, v % 64 != 5);
  y[3] = __reduce_add_sync(0xFFFFFFFF, v);
  y[4] = __reduce_max_sync(0xFFFFFFFF, (int)v);
  y[5] = __reduce_xor_sync(0xFFFFFFFF, v);
  if (t % 4 < 2) {
    y[6] = __activemask();
    y[7] = __reduce_min_sync(0x33333333, v);
  } else {
    y[6] = __ballot_sync(0xCCCCCCCC, v & 1);
    y[7] = 0;
  }
}

// y: sum, min, max, xor, float sum, compare-and-swap, tickets, of all threads and CTAs.
extern "C" __global__ void atomics(const __grid_constant__ Params p) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t v = p.x[t];
  __shared__ uint32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, v);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&p.y[0], total);
  atomicMin(&p.y[1], v);
  atomicMax((int*)&p.y[2], (int)v);
  atomicXor(&p.y[3], v);
  atomicAdd((float*)&p.y[4], (float)(v % 16));
  for (uint32_t seen = 0, now = p.y[5]; seen != now;) {
    seen = now;
    now = atomicCAS(&p.y[5], seen, seen * 3 + 1);
  }
  p.y[8 + atomicAdd(&p.y[6], 1)] = t;
  atomicAdd(&counter, 1);
}

extern "C" __global__ void variables(const __grid_constant__ Params p) {
  p.y[threadIdx.x] = powers[p.x[threadIdx.x] % 8] + counter;
}

// Bytes and halves, signed and unsigned, through global, shared, local and generic addresses.
extern "C" __global__ void memories(const __grid_constant__ Params p) {
  __shared__ int16_t halves[64];
  __shared__ uint32_t words[64];
  int t = threadIdx.x, local[8];
  const int8_t* bytes = (const int8_t*)p.x;
  halves[t] = bytes[t];
  words[t] = ((const uint16_t*)p.x)[t];
  for (int i = 0; i < 8; i++) local[i] = bytes[i] * i;
  __syncthreads();
  uint32_t* where = t % 2 ? &words[t ^ 1] : p.y + 128 + t;
  if (t % 2 == 0) p.y[128 + t] = 77;
  uint4 four = *(const uint4*)(p.x + 4 * (t % 16));
  p.y[t] = halves[t ^ 3] + local[p.x[t] % 8];
  p.y[64 + t] = *where + four.x + four.y + four.z + four.w;
}

// 16 bytes a thread, of which n come from memory; the rest is zero.
extern "C" __global__ void fill(const __grid_constant__ Params p) {
  __shared__ __align__(16) uint32_t s[4 * 32];
  int t = threadIdx.x, bytes = max(0, min(16, p.n - 16 * t));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(s) + 16 * t),
               "l"(p.x + 4 * t), "r"(bytes));
  asm volatile("cp.async.wait_all;");
  for (int i = 0; i < 4; i++) p.y[4 * t + i] = s[4 * t + i];
}

// ldmatrix of four 8 x 8 matrices of 16 bits, as they are and transposed.
extern "C" __global__ void matrices(const __grid_constant__ Params p) {
  __shared__ __align__(16) uint32_t s[128];
  int t = threadIdx.x;
  for (int i = t; i < 128; i += 32) s[i] = p.x[i];
  __syncthreads();
  uint32_t at = (uint32_t)__cvta_generic_to_shared(s) + 16 * t, r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
  for (int i = 0; i < 4; i++) p.y[4 * t + i] = r[i];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
  for (int i = 0; i < 4; i++) p.y[128 + 4 * t + i] = r[i];
}

// CTAs add in turn: each spins until the one before it is done. Floats, so that order counts.
extern "C" __global__ void turns(const __grid_constant__ Params p) {
  if (threadIdx.x == 0) {
    while (atomicAdd(&p.y[0], 0) != blockIdx.x) {
    }
    float* sum = (float*)p.y + 1;
    atomicExch(sum, atomicAdd(sum, 0.0f) * 1.5f + blockIdx.x);
    __threadfence();
    atomicAdd(&p.y[0], 1);
  }
}

// Loads, stores, atomics and copies with hints for the caches.
extern "C" __global__ void hints(const __grid_constant__ Params p) {
  __shared__ __align__(16) uint32_t s[4 * 64];
  uint32_t at = (uint32_t)__cvta_generic_to_shared(s) + 16 * threadIdx.x;
  const uint32_t* x = p.x + 4 * threadIdx.x;
  uint32_t* y = p.y + 4 * threadIdx.x;
  uint64_t once, kept, half;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %0, %1;"
               : "=l"(kept) : "f"(p.n / 64.0f));
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(half));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x + 100000));
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(x));
  uint32_t a[4], b[4], c[2], d, e;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3},"
               " [%4], %5;"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "l"(x), "l"(once));
  asm volatile("ld.global.L1::evict_first.L2::cache_hint.v2.u32 {%0, %1}, [%2+8], %3;"
               : "=r"(c[0]), "=r"(c[1]) : "l"(x), "l"(kept));
  asm volatile("ld.global.L2::128B.u32 %0, [%1];" : "=r"(d) : "l"(x));
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1+4], %2;"
               : "=r"(e) : "l"(x), "l"(half));
  uint32_t bytes = threadIdx.x % 17;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
               :
               : "r"(at), "l"(x), "r"(bytes), "l"(once)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int i = 0; i < 4; i++) b[i] = s[4 * threadIdx.x + i];
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(at), "l"(x),
               "l"(kept)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  uint32_t sum[4] = {a[0] + d, a[1] + e, a[2] + c[0], a[3] + c[1]};
  for (int i = 0; i < 4; i++) sum[i] += b[i] + s[4 * threadIdx.x + i];
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
               :
               : "l"(y), "r"(sum[0]), "r"(sum[1]), "r"(sum[2]), "r"(sum[3]), "l"(half)
               : "memory");
  asm volatile("red.global.add.L2::cache_hint.u32 [%0+12], %1, %2;" ::"l"(y), "r"(1), "l"(kept)
               : "memory");
}

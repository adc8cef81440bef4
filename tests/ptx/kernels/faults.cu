// Kernels with a mistake and without it.
#include <cstdint>

#include "mma.cuh"
#include "planted.cuh"

extern __shared__ __align__(16) uint32_t dynamic[];

// --- barriers ---

KERNEL(read_after_write) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  if (!kBad) __syncthreads();
  p.y[t] = s[(t + 32) % 256];
}

KERNEL(write_after_read) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  __syncthreads();
  uint32_t value = s[(t + 32) % 256];
  if (!kBad) __syncthreads();
  s[t] = value + 1;
  __syncthreads();
  p.y[t] = s[(t + 32) % 256];
}

KERNEL(write_after_write) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  if (!kBad) __syncthreads();
  s[255 - t] = t;
  __syncthreads();
  p.y[t] = s[t];
}

KERNEL(same_instruction) {
  __shared__ uint32_t s[256];
  s[kBad ? t / 2 : t] = t;
  __syncthreads();
  p.y[t] = kBad ? s[t / 2] : s[t];
}

KERNEL(within_a_warp) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  if (!kBad) __syncwarp();
  p.y[t] = s[t ^ 1] + __shfl_xor_sync(~0u, t, 1);
}

KERNEL(overwrite_within_a_warp) {
  __shared__ volatile uint32_t s[256];
  s[t] = p.x[t];
  s[t] = s[t] + 1;  // its own: no barrier needed
  __syncwarp();
  uint32_t value = s[t ^ 1];
  if (!kBad) __syncwarp();
  s[t] = value;
  p.y[t] = s[t];
}

KERNEL(atomic_and_plain) {
  __shared__ uint32_t s[1];
  if (t == 0) s[0] = 0;
  __syncthreads();
  atomicAdd(s, 1);
  atomicAdd(s, t);  // atomics need no barrier between them
  if (!kBad) __syncthreads();
  p.y[t] = *(volatile uint32_t*)s;
}

KERNEL(shuffle_is_no_barrier) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  uint32_t other = kBad ? __shfl_xor_sync(~0u, t, 1) : (__syncwarp(), t ^ 1);
  p.y[t] = s[other];
}

KERNEL(warp_barrier_between_warps) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  if (kBad) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  p.y[t] = s[t ^ 32];
}

// Warps 0 to 3 use barrier 1, the others barrier 2.
KERNEL(named_barriers) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  asm volatile("bar.sync %0, 128;" ::"r"(1 + t / 128) : "memory");
  p.y[t] = s[kBad ? t ^ 128 : t ^ 64];
}

KERNEL(neighbour_bytes) {
  __shared__ uint8_t s[256];
  s[t] = p.x[t];
  if (!kBad) __syncthreads();
  p.y[t] = s[t ^ 1];
}

KERNEL(matrix_load) {
  dynamic[t] = p.x[t];
  if (!kBad) __syncwarp();
  uint32_t at = __cvta_generic_to_shared(dynamic) + t / 32 * 128 + t % 8 * 16, value;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(value)
               : "r"(at)
               : "memory");
  p.y[t] = value;
}

// --- asynchronous copies ---

__device__ void copy(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
}
template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

KERNEL(copy_without_wait) {
  __shared__ uint32_t s[256];
  copy(&s[t], &p.x[t]);
  commit();
  if (!kBad) wait<0>();
  __syncthreads();
  p.y[t] = s[t];
}

KERNEL(copy_waits_for_too_little) {
  __shared__ uint32_t s[512];
  copy(&s[t], &p.x[t]);
  commit();
  copy(&s[t + 256], &p.x[t]);
  commit();
  wait<kBad ? 1 : 0>();
  __syncthreads();
  p.y[t] = s[t + 256];
}

KERNEL(copy_without_commit) {
  __shared__ uint32_t s[256];
  copy(&s[t], &p.x[t]);
  if (!kBad) commit();
  wait<0>();
  p.y[t] = s[t];
}

KERNEL(copy_without_barrier) {
  __shared__ uint32_t s[256];
  copy(&s[t], &p.x[t]);
  commit();
  wait<0>();
  if (!kBad) __syncthreads();
  p.y[t] = s[(t + 32) % 256];
}

KERNEL(stage_overwritten) {
  __shared__ uint32_t s[2][256];
  uint32_t sum = 0;
  copy(&s[0][t], &p.x[t]);
  commit();
  for (int i = 0; i < 4; i++) {
    wait<0>();
    __syncthreads();
    sum += s[i % 2][(t + 32) % 256];
    copy(&s[kBad ? i % 2 : (i + 1) % 2][t], &p.x[t]);
    commit();
  }
  wait<0>();
  p.y[t] = sum;
}

// --- addresses ---

KERNEL(read_out_of_bounds) { p.y[t] = p.x[kBad ? t + 1 : t]; }

KERNEL(write_out_of_bounds) { p.y[kBad && t == 0 ? -1 : t] = t; }

KERNEL(shared_out_of_bounds) {
  dynamic[kBad ? t + 1 : t] = p.x[t];
  p.y[t] = dynamic[kBad ? t + 1 : t];
}

KERNEL(misaligned) {
  const uint32_t* from = p.x + (kBad ? 1 : 0);
  if (t < 32) {
    uint2 pair = *reinterpret_cast<const uint2*>(from + 2 * t);
    p.y[t] = pair.x + pair.y;
  }
}

KERNEL(copy_misaligned) {
  if (t >= 64) return;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(dynamic) + 16 * t),
               "l"(p.x + (kBad ? t : 4 * t))
               : "memory");
  wait<0>();
}

// --- initialisation ---

KERNEL(uninitialised_global) { p.y[t] = kBad ? p.y[t] + 1 : p.x[t] + 1; }

KERNEL(uninitialised_shared) {
  if (t < (kBad ? 255 : 256)) dynamic[t] = t;
  __syncthreads();
  p.y[t] = dynamic[t];
}

KERNEL(uninitialised_local) {
  uint32_t local[16];
  for (int i = 0; i < (kBad ? 15 : 16); i++) local[i] = p.x[i];
  p.y[t] = local[p.x[t] % 16];
}

KERNEL(uninitialised_register) {
  uint32_t value;
  asm volatile(
      "{ .reg .b32 r; .reg .pred q;\n setp.lt.u32 q, %1, %2;\n @q mov.b32 r, 7;\n"
      " add.u32 %0, r, 1; }"
      : "=r"(value)
      : "r"(t), "r"(kBad ? p.n - 1 : p.n));
  p.y[t] = value;
}

// --- cache policies ---

__device__ uint32_t load(const uint32_t* from, uint64_t policy) {
  uint32_t value;
  asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;"
               : "=r"(value)
               : "l"(from), "l"(policy));
  return value;
}

KERNEL(uninitialised_policy) {
  uint32_t value;
  asm volatile(
      "{ .reg .b64 r; .reg .pred q;\n setp.lt.u32 q, %2, %3;\n"
      " @q createpolicy.fractional.L2::evict_first.b64 r;\n"
      " ld.global.L2::cache_hint.u32 %0, [%1], r; }"
      : "=r"(value)
      : "l"(p.x), "r"(t), "r"(kBad ? p.n - 1 : p.n));
  p.y[t] = value;
}

KERNEL(no_policy) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  p.y[t] = load(p.x, kBad ? policy + t / 255 : policy);
}

KERNEL(no_policy_of_a_copy) {
  __shared__ __align__(16) uint32_t s[4];
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  if (t > 0) return;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(s)),
               "l"(p.x), "l"(kBad ? 0 : policy)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  p.y[t] = s[3];
}

KERNEL(policy_for_no_address) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, %1;"
               : "=l"(policy)
               : "f"(kBad ? t / 256.0f : (t + 1) / 256.0f));
  p.y[t] = load(p.x, policy);
}

// --- warps ---

KERNEL(divergent_mma) {
  uint32_t a[4] = {p.x[t], p.x[t], p.x[t], p.x[t]}, b[2] = {p.x[t], p.x[t]};
  uint32_t c[4] = {};
  if (kBad ? t % 32 != 7 : t / 32 != 1) mma_b1(c, a, b);
  p.y[t] = c[0];
}

KERNEL(divergent_shuffle) {
  uint32_t value = p.x[t];
  if (t % 32 < 16) value += __shfl_xor_sync(kBad ? 0xFFFFFFFF : 0xFFFF, value, 1);
  p.y[t] = value;
}

KERNEL(divergent_barrier) {
  if (kBad ? t % 32 : true) __syncthreads();
  p.y[t] = t;
}

KERNEL(barrier_after_exit) {
  if (kBad && t >= 128) return;
  __syncthreads();
  p.y[t] = t;
}

KERNEL(different_barriers) {
  asm volatile("bar.sync %0;" ::"r"(kBad ? t / 128 : 0) : "memory");
  p.y[t] = t;
}

KERNEL(endless) {
  volatile uint32_t* y = p.y;
  y[t] = 1;
  while (kBad && y[t] != 0) {
  }
}

KERNEL(trap) {
  if (kBad && t == 3) __trap();
  p.y[t] = t;
}

// --- races in global memory ---

KERNEL(two_ctas) { p.y[t] = kBad ? blockIdx.x : 1; }

KERNEL(two_threads) { p.y[kBad ? t / 2 : t] = t; }

KERNEL(rewritten) {
  p.y[t] = t;
  if (!kBad) __syncthreads();
  p.y[255 - t] = t;
}

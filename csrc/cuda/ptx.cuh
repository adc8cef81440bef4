// One wrapper for each instruction that C++ has no name for.
#pragma once

#include <cstdint>

namespace anyprec::cuda {

// 16 bytes from global to shared memory, on their own; zeros where not `valid`.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// A policy for what is read once: it leaves the L2 cache before anything else.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// 16 bytes by a policy. Neighbours up to 256 bytes come to the L2 cache with them.
__device__ inline void copy_async(void* to, const void* from, uint64_t policy) {
  auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;"
               ::"r"(shared), "l"(from), "l"(policy)
               : "memory");
}
// Brings what lies at `at` to the L2 cache.
__device__ inline void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kLeft` of the latest groups of copies are under way.
template <int kLeft>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// The same for a number that is known when the kernel runs, up to 6.
__device__ inline void wait_copies(int left) {
  switch (left) {
    case 0: return wait_copies<0>();
    case 1: return wait_copies<1>();
    case 2: return wait_copies<2>();
    case 3: return wait_copies<3>();
    case 4: return wait_copies<4>();
    case 5: return wait_copies<5>();
    default: return wait_copies<6>();
  }
}

// 1 / x to a unit in the last place; also where it is subnormal.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- compute capability 9.0 and newer: launches that begin early, and clusters of blocks ---

// Once all blocks of a launch have called begin_next_launch(), or ended, the next one may begin, if
// it is a dependent one (launch.h). Until wait_for_launch_before() returns to a thread, it reads
// only what was there before the operation, which are weights, and writes nothing to global memory.
// Then the launch before has ended, and its results can be seen. That one waited as well, so all
// earlier ones have ended too: nobody still reads what is now overwritten.
__device__ inline void begin_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier of all threads of a cluster, in two steps: what they did to shared memory before they
// arrived is done for all that waited.
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// What lies at `at` of this block's shared memory, in that of block `rank` of the cluster.
__device__ inline float load_of_block(const float* at, int rank) {
  float x = 0;
#if __CUDA_ARCH__ >= 900
  auto here = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
#endif
  return x;
}

// d += a b: 16 x 256 bits by 256 x 8, counting the bits that both have.
__device__ inline void mma_and_popcount(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d += a b: 16 x 32 unsigned bytes by 32 x 8 signed ones.
__device__ inline void mma_bytes(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b: 16 x 16 bfloat16 by 16 x 8.
__device__ inline void mma_bfloat(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a b + c of two bfloat16 each.
__device__ inline uint32_t fma_bfloat2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace anyprec::cuda

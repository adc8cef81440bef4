// What CTAs of a cluster do together.
#include <cstdint>

#include "cluster.cuh"

struct Params {
  const uint32_t* x;
  uint32_t* y;
  int n;
};

#define SPECIAL(name)                                     \
  ([] {                                                   \
    uint32_t value;                                       \
    asm volatile("mov.u32 %0, %%" name ";" : "=r"(value)); \
    return value;                                         \
  }())

// 16 words of each CTA: which one it is.
extern "C" __global__ void identities(const __grid_constant__ Params p) {
  uint32_t cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  uint32_t words[] = {
      SPECIAL("cluster_ctarank"), SPECIAL("cluster_nctarank"), SPECIAL("cluster_ctaid.x"),
      SPECIAL("cluster_ctaid.y"), SPECIAL("cluster_ctaid.z"),  SPECIAL("cluster_nctaid.x"),
      SPECIAL("cluster_nctaid.y"), SPECIAL("cluster_nctaid.z"), SPECIAL("clusterid.x"),
      SPECIAL("clusterid.y"),     SPECIAL("clusterid.z"),      SPECIAL("nclusterid.x"),
      SPECIAL("nclusterid.y"),    SPECIAL("nclusterid.z"),     SPECIAL("nctaid.x"),
      SPECIAL("ctaid.x")};
  for (int i = 0; i < 16; i++) p.y[16 * cta + i] = words[i];
}

// All CTAs read what the others of their cluster have, in each way that there is, and write it.
extern "C" __global__ void exchange(const __grid_constant__ Params p) {
  __shared__ __align__(16) uint32_t s[4 * 64], other[4 * 64];
  uint32_t size = SPECIAL("cluster_nctarank"), rank = cluster_rank(), t = threadIdx.x;
  for (int i = 0; i < 4; i++) s[4 * t + i] = p.x[(blockIdx.x * 64 + t) * 4 + i];
  cluster_sync();
  uint32_t sum[4] = {};
  for (uint32_t r = 0; r < size; r++) {
    uint32_t at = shared_of(&s[4 * t], r), a[4], b[2];
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at));
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2+8];" : "=r"(b[0]), "=r"(b[1]) : "r"(at));
    uint64_t generic;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(generic) : "l"(&s[4 * t]), "r"(r));
    const uint32_t* there = (const uint32_t*)generic;
    uint32_t c;
    asm volatile("ld.shared::cluster.u8 %0, [%1+13];" : "=r"(c) : "r"(at));
    sum[0] += a[0] * (r + 1) + b[0];
    sum[1] += a[1] * (r + 1) + b[1];
    sum[2] += a[2] * (r + 1) + there[1];
    sum[3] += a[3] * (r + 1) + c;
  }
  uint32_t next = shared_of(&other[4 * t], (rank + 1) % size);
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(next), "r"(sum[0]),
               "r"(sum[1]), "r"(sum[2]), "r"(sum[3])
               : "memory");
  cluster_sync();
  for (int i = 0; i < 4; i++) p.y[(blockIdx.x * 64 + t) * 4 + i] = other[4 * t + i];
}

// The first CTA of each cluster gets the sum over all; each adds with and without a result.
extern "C" __global__ void reduce(const __grid_constant__ Params p) {
  __shared__ uint32_t sums[2], places;
  uint32_t t = threadIdx.x, size = SPECIAL("cluster_nctarank"), v = p.x[blockIdx.x * 64 + t];
  if (t < 2) sums[t] = 0;
  if (t == 2) places = 0;
  cluster_sync();
  add_shared(shared_of(&sums[t % 2], 0), v);
  uint32_t place;
  asm volatile("atom.shared::cluster.add.u32 %0, [%1], 1;"
               : "=r"(place)
               : "r"(shared_of(&places, 0))
               : "memory");
  uint32_t* y = p.y + blockIdx.x / size * (2 + 64 * size);
  y[2 + place] = v;
  arrive();
  if (cluster_rank() == 0) {
    wait();
    if (t < 2) y[t] = sums[t];
  }
}

// n times each CTA hands on what it has to the next, works alone, and takes what came.
extern "C" __global__ void ring(const __grid_constant__ Params p) {
  __shared__ uint32_t s[2][64];
  uint32_t t = threadIdx.x, size = SPECIAL("cluster_nctarank"), rank = cluster_rank();
  uint32_t value = p.x[blockIdx.x * 64 + t], own = 0;
  arrive_relaxed();
  wait();
  for (int i = 0; i < p.n; i++) {
    store_shared(shared_of(&s[i % 2][t], (rank + 1) % size), value);
    arrive();
    for (uint32_t j = 0; j < rank * 3 % 5; j++) {
      own = own * 3 + value;
      __syncthreads();
    }
    wait();
    value = s[i % 2][t ^ 33] + 1;
  }
  p.y[blockIdx.x * 64 + t] = value + own;
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) fixed(const __grid_constant__ Params p) {
  if (threadIdx.x == 0) p.y[blockIdx.x] = cluster_rank();
}

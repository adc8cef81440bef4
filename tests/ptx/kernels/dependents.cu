// y = x + 1, in a launch that may be dependent, and where it waits for the launch before.
#include <cstdint>

struct Params {
  const uint32_t* x;
  uint32_t* y;
  int n;  // which of these it does
};

enum { kTriggerFirst = 1, kWaitFirst = 2, kWaitLast = 4, kTriggerLast = 8, kOneWarpWaits = 16 };

__device__ void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <typename Work>
__device__ void step(const Params& p, Work work) {
  if (p.n & kTriggerFirst) trigger();
  if (p.n & kWaitFirst) wait();
  if (p.n & kOneWarpWaits && threadIdx.x < 32) wait();
  __syncthreads();
  work(blockIdx.x * blockDim.x + threadIdx.x);
  if (p.n & kWaitLast) wait();
  if (p.n & kTriggerLast) trigger();
}

extern "C" __global__ void plain(const __grid_constant__ Params p) {
  step(p, [&](int i) { p.y[i] = p.x[i] + 1; });
}

extern "C" __global__ void copied(const __grid_constant__ Params p) {
  __shared__ uint32_t s[64];
  step(p, [&](int i) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(&s[threadIdx.x])),
                 "l"(&p.x[i])
                 : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    p.y[i] = s[threadIdx.x] + 1;
  });
}

// Its y is set to zero before.
extern "C" __global__ void added(const __grid_constant__ Params p) {
  step(p, [&](int i) { atomicAdd(&p.y[i], p.x[i] + 1); });
}

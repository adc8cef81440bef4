#include "run.h"

#include <cuda_runtime.h>

#include <stdexcept>

// The kernels, which the other files of this folder define.
#define ANYPREC_DECLARE_GEMM(name, ...) \
  extern "C" __global__ void name(const __grid_constant__ anyprec::cuda::Gemm p);
#define ANYPREC_DECLARE_STREAM(name, ...) \
  extern "C" __global__ void name(const __grid_constant__ anyprec::cuda::Stream p);
#define ANYPREC_DECLARE_PROLOGUE(name, ...) \
  extern "C" __global__ void name(const __grid_constant__ anyprec::cuda::Prologue p);
ANYPREC_GEMMS(ANYPREC_DECLARE_GEMM)
ANYPREC_STREAMS(ANYPREC_DECLARE_STREAM)
ANYPREC_PROLOGUES(ANYPREC_DECLARE_PROLOGUE)
extern "C" __global__ void anyprec_reduce(const __grid_constant__ anyprec::cuda::Reduce p);

namespace anyprec::cuda {
namespace {

#define ANYPREC_KERNEL_ADDRESS(name, ...) reinterpret_cast<const void*>(&name),
const void* const kAddresses[] = {ANYPREC_KERNELS(ANYPREC_KERNEL_ADDRESS)};

// Blocks have so much shared memory unless more is asked for.
constexpr uint32_t kUsualSharedBytes = 48 * 1024;

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and to nobody else later
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "the device can't be queried");
  return value;
}

int arch_of(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

DeviceInfo describe(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "the device can't be queried");
  return {properties.name, {arch_of(device), properties.multiProcessorCount}};
}

}  // namespace

void run(const std::vector<Launch>& launches, CUstream_st* stream) {
  for (const Launch& l : launches) {
    const void* kernel = kAddresses[static_cast<size_t>(l.kernel)];
    const std::string what = std::string("kernel ") + name_of(l.kernel) + " can't be launched";
    if (l.shared_bytes > kUsualSharedBytes) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(l.shared_bytes)),
            what);
    }
    void* params[] = {const_cast<std::byte*>(l.params)};
    check(cudaLaunchKernel(kernel, dim3(l.grid[0], l.grid[1]), dim3(l.threads), params,
                           l.shared_bytes, stream),
          what);
  }
}

int current_arch() {
  int device = 0;
  check(cudaGetDevice(&device), "there is no current device");
  return arch_of(device);
}

Devices find_devices() {
  Devices devices;
  int count = 0;
  try {
    check(cudaGetDeviceCount(&count), "CUDA devices can't be listed");
    for (int i = 0; i < count; ++i) devices.found.push_back(describe(i));
  } catch (const std::runtime_error& e) {
    return {{}, e.what()};
  }
  if (devices.found.empty()) devices.error = "there is no CUDA device";
  return devices;
}

}  // namespace anyprec::cuda

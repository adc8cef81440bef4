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

// Whether a kernel waits itself for the launch before, so that it may begin early, and knows of
// clusters. Code for older devices does not, also where the driver compiled its PTX for a newer one.
bool waits_itself(const void* kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "the kernels can't be queried");
  return attributes.ptxVersion >= 90;
}

DeviceInfo describe(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "the device can't be queried");
  return {properties.name, arch_of(device), properties.multiProcessorCount};
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
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(l.grid[0], l.grid[1]);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (l.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = cluster.val.clusterDim.z = 1;
      cluster.val.clusterDim.y = l.cluster;
    }
    if (l.dependent && waits_itself(kernel)) {
      cudaLaunchAttribute& early = attributes[config.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
    check(cudaLaunchKernelExC(&config, kernel, params), what);
  }
}

Device current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "there is no current device");
  return {arch_of(device), attribute(cudaDevAttrMultiProcessorCount, device),
          waits_itself(kAddresses[0])};
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

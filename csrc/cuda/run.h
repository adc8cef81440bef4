// Launches on a stream, and what devices there are: all that the CUDA runtime is needed for.
#pragma once

#include <string>
#include <vector>

#include "launch.h"

struct CUstream_st;  // cudaStream_t points to one

namespace anyprec::cuda {

// Queues launches one after another. Allocates nothing and waits for nothing, so it can be captured.
// Throws std::runtime_error with the kernel's name.
void run(const std::vector<Launch>& launches, CUstream_st* stream);

// The device that the calling thread's launches go to. Throws std::runtime_error.
Device current_device();

struct DeviceInfo {
  std::string name;
  int arch, multiprocessors;
};

// The devices, or none and the reason. Works without a driver too.
struct Devices {
  std::vector<DeviceInfo> found;
  std::string error;
};
Devices find_devices();

}  // namespace anyprec::cuda

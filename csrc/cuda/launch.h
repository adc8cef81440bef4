// An operation as the launches that compute it: kernels, grids and parameters, by pure functions.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace anyprec::cuda {

#define ANYPREC_KERNEL_ID(name, ...) name,
enum class Kernel : int32_t { ANYPREC_KERNELS(ANYPREC_KERNEL_ID) kCount };
#undef ANYPREC_KERNEL_ID

const char* name_of(Kernel kernel);

struct Launch {
  Kernel kernel;
  uint32_t grid[2];
  uint32_t threads;
  uint32_t shared_bytes;
  uint32_t cluster;  // blocks of a column of the grid that are a cluster; 1 for none
  bool dependent;    // it may begin before the last one ends, for which it waits itself (ptx.cuh)
  size_t param_bytes;
  alignas(16) std::byte params[256];  // the kernel's only parameter
};

// Operands and results; absent ones are null.
struct Buffers {
  const void* x;
  const uint32_t* tiles;
  const void* scales;
  const void* offsets;
  const void* bias;
  const uint32_t* signs;
  const float* peaks;
  void* out;
  uint8_t* workspace;  // layout_of(...).row_bytes for each row
  float* parts;        // [splits][m][n], null if splits is 1 or the plan is clustered
  DType scale_dtype, offset_dtype, bias_dtype, out_dtype;
  int64_t block;       // Hadamard block, 0 for no rotation
};

// A product, or with problem.integers its integer part, whose x are codes, on a device. The first
// launch isn't a dependent one: what comes before is XLA's, and may write what this one reads.
std::vector<Launch> matmul_launches(const Problem& problem, const Plan& plan, const Device& device,
                                    const Buffers& buffers);

// Codes uint8[m][k] and scales float[m][groups] of x [m][k].
std::vector<Launch> quantize_launches(const Problem& problem, const void* x, const uint32_t* signs,
                                      int64_t block, uint8_t* codes, float* scales);

}  // namespace anyprec::cuda

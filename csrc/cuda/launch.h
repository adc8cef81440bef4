// An operation as the launches that compute it: kernels, grids and parameters, by pure functions.
#pragma once

#include <cstddef>
#include <string>
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
  alignas(16) std::byte params[272];  // the kernel's only parameter
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
  // What only products of few rows have: x is [m][2 k] before kSwiGlu.
  Before before;
  float eps;                // of kRmsNorm, as the scale is
  const float* norm_scale;  // [k]
  const void* residual;     // [m][n]
  DType residual_dtype;
};

// By its name in compiled programs; throws std::invalid_argument.
Before parse_before(const std::string& name);

// A product, or with problem.integers its integer part, whose x are codes, on a device. The first
// launch isn't a dependent one: what comes before is XLA's, and may write what this one reads.
// Throws std::invalid_argument unless the plan has all that buffers ask for.
std::vector<Launch> matmul_launches(const Problem& problem, const Plan& plan, const Device& device,
                                    const Buffers& buffers);

// Codes uint8[m][k] and scales float[m][groups] of x [m][k].
std::vector<Launch> quantize_launches(const Problem& problem, const void* x, const uint32_t* signs,
                                      int64_t block, uint8_t* codes, float* scales);

}  // namespace anyprec::cuda

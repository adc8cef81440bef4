// Which kernel computes a product on which chip, in which tiles, and why: pure functions.
#pragma once

#include <string>

#include "tiles.h"

namespace anyprec::cuda {

struct Problem {
  int64_t m;               // rows of activations; kManyRows where they are not known
  int64_t n, k;
  int act_bits;            // 0: float
  int weight_bits;
  int64_t group_size;      // of the weights' scales
  int64_t act_group_size;  // that, or k
  DType x;
  bool rotated;
  bool integers;           // only the integer part, int32[m][n][groups]
};

constexpr int64_t kManyRows = 1 << 20;

struct Device {
  int arch;             // 10 * major + minor of the compute capability
  int multiprocessors;
  bool clusters;        // its kernels have clusters and dependent launches: see ptx.cuh
};

struct Plan {
  Method method;
  Tile tile;
  int splits;      // parts of K
  bool clustered;  // their blocks add them up, in a cluster; otherwise a launch does afterwards
  bool quantizes;  // each block does it with the single row, not a launch before
  std::string reason;
};

// Why a method can't compute a product on a chip; empty if it can.
std::string refusal(Method method, const Problem& problem, int arch);

// The method for a product, or `asked` ("" or "planes", "codes", "float"), and its tiles. Throws
// std::invalid_argument with the reason if none can.
Plan make_plan(const Problem& problem, const Device& device, const std::string& asked);

// Whether reading the weights is all that takes time: then kStream can be used.
bool is_stream(Method method, const Problem& problem);

// Whether each block of a product of few rows can quantize them: a single row that fits, of a multiple
// of kValues.
bool can_quantize(Method method, const Problem& problem);
constexpr int kMostCluster = 8;  // blocks, on all chips

// The number of times that activations are read: planes, or parts of floats.
int pass_count(Method method, const Problem& problem);
Layout layout_of(Method method, const Problem& problem);

// By their names in Python and in compiled programs; throw std::invalid_argument.
Method parse_method(const std::string& name);
Tile parse_tile(const std::string& name);
const char* name_of(Method method);
const char* name_of(Tile tile);

}  // namespace anyprec::cuda

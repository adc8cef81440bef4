// What the CUDA kernels are given, and where things lie in a product's workspace: host and device.
#pragma once

#include <cstdint>

#include "../format.h"

namespace anyprec::cuda {

enum class DType : int32_t { kF32, kF16, kBF16, kU8 };  // kU8: codes of activations

// How a product is computed: 1-bit tensor cores, 8-bit ones, or bfloat16 ones for float activations.
enum class Method : int32_t { kPlanes, kCodes, kFloat };

// What values go through before they are activations of a product (jax_anyprec/before.py).
enum class Before : int32_t { kNone, kRmsNorm, kSwiGlu };

// Activations lie in blocks of 64 bytes a row and pass. In a block, lane q of a quad of lanes has
// bytes 16 q .. 16 q + 15, which is what it multiplies with:
//   kPlanes  512 bits of one plane (a pass each, the most significant first); words q + 4 r
//   kCodes   64 signed bytes, integers over act_unit(bits); index 32 s + 8 b + q + 4 h at
//            16 q + 8 s + 4 h + b
//   kFloat   32 bfloat16 of one part (a pass each); index 8 b + q + 4 h at
//            8 q + 4 h + 2 (b % 2) + b / 2
constexpr int kBlockBytes = 64;
constexpr int block_words(Method method) {
  return method == Method::kPlanes ? 16 : method == Method::kCodes ? 2 : 1;
}

// Float activations are bfloat16 parts whose sum they are: bfloat16 is one, float16 has 11
// significant bits in two, and float32, which rotated activations are too, has 24 in three.
constexpr int float_parts(DType x, bool rotated) {
  if (rotated || x == DType::kF32) return 3;
  return x == DType::kF16 ? 2 : 1;
}

// Neighbouring values of a row that a lane reads, at once if rows are a multiple of them.
constexpr int kValues = 8;

// The longest group whose sums of a signed and an unsigned byte fit int32.
constexpr int64_t kMaxGroup = 65536;

// Rows of 64 * blocks * passes bytes for each of m rows, block after block and pass after pass:
//   payload  [passes][blocks][m][64]
//   scales   float[act_groups][m], times the unit of the payload; none for kFloat
//   sums     [groups][m]: of the payload, int32; for kFloat of the activations, float
struct Layout {
  int64_t blocks, passes, scales, sums;  // the latter two in bytes for each row
  int64_t row_bytes;
};

inline Layout make_layout(Method method, int64_t k, int passes, int64_t act_groups,
                          int64_t groups) {
  Layout l{};
  l.blocks = (words(k) + block_words(method) - 1) / block_words(method);
  l.passes = passes;
  l.scales = kBlockBytes * l.blocks * l.passes;
  l.sums = l.scales + (method == Method::kFloat ? 0 : 4 * act_groups);
  l.row_bytes = l.sums + 4 * groups;
  return l;
}

// The longest row whose words have a number each in the shared memory of a prologue.
constexpr int64_t kMaxRowWords = 12 * 1024;
constexpr int kReduceThreads = 256;

// Parameters of the kernels that lay activations out.
struct Prologue {
  const void* x;          // [m][k] of dtype, or codes; gates and values [m][2][k] for kSwiGlu
  const uint32_t* signs;  // [words(k)], a set bit is -1
  const float* peaks;     // [m] largest magnitudes to scale by, or null for each row's own
  uint8_t* payload;       // as above, or codes [m][k]
  float* scales;          // [act_groups][m], for codes [m][act_groups]
  void* sums;             // [groups][m] or null
  const float* norm_scale;  // [k] for kRmsNorm
  DType dtype;
  int32_t m, k, blocks;
  int32_t bits;           // of a code; number of parts of floats
  int32_t block;          // Hadamard block, 0 for no rotation
  float norm;             // 1 / sqrt(block)
  int32_t act_group_words, act_groups;  // words and number of groups of activation scales
  int32_t group_words, groups;          // and of weights' scales, for the sums
  Before before;
  float eps;              // of kRmsNorm
};

// Parameters of the kernels that multiply. Each of `splits` z takes `split_blocks` blocks of K.
struct Gemm {
  const uint32_t* weights;  // tiles
  const void* scales;       // [tiles][groups][kTile]
  const void* offsets;      // or null
  const void* bias;         // [n] or null
  const uint8_t* payload;
  const float* act_scales;
  const void* act_sums;
  void* out;                // [m][n]; float[splits][m][n] if split; int32[m][n][groups] of integers
  DType scale_dtype, offset_dtype, bias_dtype, out_dtype;
  int32_t m, n, words, blocks;
  int32_t passes, split_blocks, splits;
  int32_t groups, group_words;
  int32_t act_groups;       // 1 or `groups`
  int32_t act_bits;         // 0 for floats
  bool integers;            // the result is sums of q_x q_w
};

// Parameters of the kernels for few rows, which can quantize a single row themselves.
struct Stream {
  Gemm gemm;
  Prologue prologue;
  const void* residual;  // [m][n] or null, added to results
  DType residual_dtype;
  bool quantizes;       // the row, not a prologue
  bool clustered;       // the splits are a cluster of blocks
  int32_t quantize_at;  // where in shared memory
  int32_t stages;       // of each warp
};

// Parameters of the kernel that adds the parts of a split product.
struct Reduce {
  const float* parts;    // [splits][m][n]
  const void* bias;      // [n] or null
  const void* residual;  // [m][n] or null
  void* out;             // [m][n]
  DType bias_dtype, residual_dtype, out_dtype;
  int32_t splits, n;
  int64_t count;  // m * n
};

}  // namespace anyprec::cuda

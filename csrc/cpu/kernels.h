// What a CPU kernel is given and what it computes: plain C++, no XLA, no Python.
#pragma once

#include <cstdint>

#include "../format.h"

namespace anyprec::cpu {

enum class DType : int { kF32, kF16, kBF16 };
enum class Method : int { kFloat, kCodes, kPlanes };

// The longest stretch of K that is summed as integers: 2^15 * 256 * 255 < 2^31.
constexpr int kMaxSegmentWords = 1024;

// Rows of activations that one call of a product handles.
constexpr int kMaxRows = 128;

// A stretch of K inside one weight group. Products are exact integers over a segment; scales,
// offsets and segments are summed in float32.
struct Segment {
  int32_t word;    // first word
  int32_t words;   // number of words
  int32_t k;       // values, the last word may be partial
  int32_t group;   // weight group
};

// Where the quantized activations of a row lie in its part of the workspace.
//   payload  kCodes: int8[words * 32], integers over act_unit(bits); index 8 b + q of a word is at
//                    4 q + b, in the order of fields
//            kFloat: one such part for each digit, `bytes` apart
//            kPlanes: uint32[act_bits][words]
//   sums     int32 for each segment: the sum of the payload's integers
//   scales   float[act_groups], times the unit of the payload; of the first part for kFloat
struct RowLayout {
  int64_t sums, scales, bytes;
  int parts;  // of a row
};

struct Activations {
  const void* x;  // [m][k] of dtype
  DType dtype;
  int64_t m, k;
  int bits;                // 0: float
  int64_t group_size;      // values that share an activation scale
  int64_t block;           // Hadamard block, 0 for no rotation
  const uint32_t* signs;   // [words(k)], a set bit is -1
  const float* peaks;      // [m] largest magnitudes to scale by, or null for each row's own
};

struct Matrix {
  bool prepared;           // in tiles, or planes [bits][n][words(k)] with scales [n][groups]
  const uint32_t* planes;
  int bits;
  int64_t n;
  const void* scales;
  const void* offsets;     // or null
  DType scale_dtype, offset_dtype;
  int64_t groups;
};

struct Product {
  Activations act;
  Matrix w;
  Method method;
  const Segment* segments;
  int64_t segment_count;
  RowLayout row;
  uint8_t* workspace;      // [m][row.parts][row.bytes]
  const void* bias;        // [n] or null
  DType bias_dtype;
  void* out;               // [m][n] of out_dtype, or int32[m][n][groups] for int_matmul
  DType out_dtype;
};

// One instruction set. All functions are reentrant and touch only what they are given.
struct Kernels {
  const char* name;
  int columns;  // output columns of one block

  // Quantizes (or converts) row `m` of p.act into its part of the workspace.
  // `scratch` holds prologue_bytes(k).
  void (*prologue)(const Product& p, int64_t m, uint8_t* scratch);

  // Lays out given codes uint8[words * 32] as the prologue would, and uses them up.
  void (*prologue_codes)(const Product& p, int64_t m, uint8_t* codes);

  // Codes uint8[k] and scales float[groups] of row `m`, for the public quantizer.
  void (*quantize)(const Activations& a, int64_t m, uint8_t* scratch, uint8_t* codes,
                   float* scales);

  // Output columns block * columns .. and rows m0 .. m1, at most kMaxRows of them. `scratch` holds
  // block_bytes(p), aligned to 64.
  void (*product)(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* scratch);

  // Exact sums of q_x q_w for each group of the same columns and rows, added to p.out.
  void (*int_product)(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* scratch);
};

// Null where the compiler could not build them.
const Kernels* portable_kernels();
const Kernels* neon_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();

RowLayout row_layout(int64_t k, int64_t segments, int64_t act_groups, int act_bits, Method method);

// Room for a row of floats and its codes or digits.
int64_t prologue_bytes(int64_t k);

// Room for a tile of weights brought into the order that its product reads.
int64_t block_bytes(const Product& p);

// Number of segments for K in groups, and the segments themselves.
int64_t segment_count(int64_t k, int64_t group_size);
void make_segments(int64_t k, int64_t group_size, Segment* out);

}  // namespace anyprec::cpu

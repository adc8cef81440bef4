// The layout contract of bipolar-INT tensors, for host and device code.
// jax_anyprec/format.py is its Python side; tests/test_format.py holds the two together.
#pragma once

#include <cstdint>

namespace anyprec {

// Bit k % 32 of word k / 32 of a plane belongs to index k; plane 0 is the most significant.
constexpr int kWordBits = 32;
constexpr int kMaxBits = 8;

// Prepared tensors: uint32[ceil(N / kTile)][words][bits][kTile]. The words of a column's 32 indices
// hold fields: for each part of c = 8, 4, 2, 1 bits that the number of bits is the sum of, low bits
// first, c words; the code of index 8 b + q is in word q % c, from bit 8 b + c (q / c) up. Scales
// and offsets of prepared tensors are [ceil(N / kTile)][groups][kTile].
constexpr int kTile = 32;

// Usable scales: inside this range encode() meets no float32 overflow or subnormal.
constexpr float kMinScale = 0x1p-100f;
constexpr float kMaxScale = 0x1p100f;
// Levels of a smaller magnitude count as 0, whether subnormals are flushed or not.
constexpr float kZeroLevel = 0x1p-24f;

// Largest odd integer of the format, also the largest code.
constexpr int max_level(int bits) { return (1 << bits) - 1; }

// Activations of so many bits and more are on even integers, which have a zero.
constexpr int kZeroBits = 4;

// Codes u of activations stand for 2 u - act_centre(bits), of magnitude act_max_level at most when
// they come from floats.
constexpr int act_centre(int bits) { return bits < kZeroBits ? max_level(bits) : 1 << bits; }
constexpr int act_max_level(int bits) {
  return bits < kZeroBits ? max_level(bits) : (1 << bits) - 2;
}

// Float activations are integers of 24 bits over the largest magnitude of a group, as kFloatDigits
// signed bytes: digit d counts 256^d.
constexpr int kFloatDigits = 3;
constexpr int32_t kFloatLevel = 0x7f7f7f;

// A product by codes takes activations as signed bytes: the integers themselves, at 8 bits their
// halves.
constexpr int act_unit(int bits) { return bits == kMaxBits ? 2 : 1; }

constexpr int64_t words(int64_t k) { return (k + kWordBits - 1) / kWordBits; }
constexpr int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

}  // namespace anyprec

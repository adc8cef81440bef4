// The layout contract of bipolar-INT tensors, for host and device code.
// jax_anyprec/format.py is its Python side; tests/test_format.py holds the two together.
#pragma once

#include <cstdint>

namespace anyprec {

// Bit k % 32 of word k / 32 of a plane belongs to index k; plane 0 is the most significant.
constexpr int kWordBits = 32;
constexpr int kMaxBits = 8;

// Usable scales: inside this range encode() meets no float32 overflow or subnormal.
constexpr float kMinScale = 0x1p-100f;
constexpr float kMaxScale = 0x1p100f;
// Levels of a smaller magnitude count as 0, whether subnormals are flushed or not.
constexpr float kZeroLevel = 0x1p-24f;

// Largest odd integer of the format, also the largest code.
constexpr int max_level(int bits) { return (1 << bits) - 1; }

// Activations of so many bits and more are on even integers, which have a zero.
constexpr int kZeroBits = 5;

// Codes u of activations stand for 2 u - act_centre(bits), of magnitude act_max_level at most when
// they come from floats.
constexpr int act_centre(int bits) { return bits < kZeroBits ? max_level(bits) : 1 << bits; }
constexpr int act_max_level(int bits) {
  return bits < kZeroBits ? max_level(bits) : (1 << bits) - 2;
}

constexpr int64_t words(int64_t k) { return (k + kWordBits - 1) / kWordBits; }

}  // namespace anyprec

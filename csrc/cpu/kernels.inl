// The kernels, written once over the vector operations that an instruction set provides.
//
// The including file defines `Isa` in an anonymous namespace first (vector4.h lists what it
// must have). A vector holds one 32-bit lane for each of Isa::kLanes output columns, so a product
// needs no horizontal sums, and scales and offsets apply lane by lane. Codes are taken out of their
// fields in registers and used for up to Isa::kRows rows of activations. docs/format.md derives
// the integer identities.

#include <type_traits>

#include "half.h"

// Arrays of vectors pass between these functions in registers only if they are inlined.
#define ANYPREC_INLINE inline __attribute__((always_inline))

namespace anyprec::cpu {
namespace {

using V = Isa::V;  // int32 lanes
using F = Isa::F;  // float lanes
constexpr int L = Isa::kLanes;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// `offset` bytes into one part of the workspace; row m has the parts from m * p.row.parts on.
template <typename T>
inline T* in_part(const Product& p, int64_t part, int64_t offset) {
  return reinterpret_cast<T*>(p.workspace + part * p.row.bytes + offset);
}

}  // namespace
}  // namespace anyprec::cpu

#include "activations.inl"
#include "block.inl"
#include "product.inl"

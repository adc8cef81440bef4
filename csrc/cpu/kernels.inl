// The kernels, written once over the vector operations that an instruction set provides.
//
// The including file defines `Isa` in an anonymous namespace first (portable.cc lists what it
// must have). A vector holds one 32-bit lane for each of Isa::kLanes output columns, so a product
// needs no horizontal sums, and scales and offsets apply lane by lane. Codes are taken out of their
// fields in registers and used for up to Isa::kRows rows of activations. docs/format.md derives
// the integer identities.

#include <type_traits>

#include "half.h"

namespace anyprec::cpu {
namespace {

using V = Isa::V;  // int32 lanes
using F = Isa::F;  // float lanes
constexpr int L = Isa::kLanes;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
inline const T* row_part(const Product& p, int64_t m, int64_t offset) {
  return reinterpret_cast<const T*>(p.workspace + m * p.row.bytes + offset);
}
template <typename T>
inline T* row_part_mut(const Product& p, int64_t m, int64_t offset) {
  return reinterpret_cast<T*>(p.workspace + m * p.row.bytes + offset);
}

}  // namespace
}  // namespace anyprec::cpu

#include "activations.inl"
#include "block.inl"
#include "product.inl"

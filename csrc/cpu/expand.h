// Codes from planes, one bit at a time: for instruction sets without a bit transpose.
#pragma once

#include "../format.h"

namespace anyprec::cpu {
namespace {

// quads[i] gets the codes of indices 4 i .. 4 i + 3 of a word, a byte each; planes[0] is the most
// significant.
template <typename Isa, int W>
inline void append_planes(const typename Isa::V (&planes)[W], typename Isa::V* quads) {
  typename Isa::V codes[8];
  for (auto& c : codes) c = Isa::zero();
  for (int j = 0; j < W; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) codes[i] = Isa::append_bits(codes[i], planes[j], i);
  }
  for (int i = 0; i < 8; ++i) quads[i] = codes[i];
}

}  // namespace
}  // namespace anyprec::cpu

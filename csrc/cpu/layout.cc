// Segments of K, and the sizes of workspace rows and scratch: bookkeeping shared by all kernels.
#include <algorithm>

#include "kernels.h"

namespace anyprec::cpu {
namespace {

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename F>
void for_each_segment(int64_t k, int64_t group_size, F&& emit) {
  constexpr int64_t kLongest = int64_t{kMaxSegmentWords} * kWordBits;
  for (int64_t begin = 0, group = 0; begin < k; begin += group_size, ++group) {
    for (int64_t at = begin; at < begin + group_size; at += kLongest) {
      int64_t size = std::min<int64_t>(kLongest, begin + group_size - at);
      emit(Segment{static_cast<int32_t>(at / kWordBits), static_cast<int32_t>(words(size)),
                   static_cast<int32_t>(size), static_cast<int32_t>(group)});
    }
  }
}

}  // namespace

int64_t segment_count(int64_t k, int64_t group_size) {
  int64_t count = 0;
  for_each_segment(k, group_size, [&](const Segment&) { ++count; });
  return count;
}

void make_segments(int64_t k, int64_t group_size, Segment* out) {
  for_each_segment(k, group_size, [&](const Segment& s) { *out++ = s; });
}

RowLayout row_layout(int64_t k, int64_t segments, int64_t act_groups, int act_bits,
                     Method method) {
  int64_t payload = words(k) * (method == Method::kPlanes ? 4 * act_bits : kWordBits);
  RowLayout row;
  row.sums = align64(payload);
  row.scales = row.sums + align64(segments * 4);
  row.bytes = row.scales + align64(act_groups * 4);
  row.parts = method == Method::kFloat ? kFloatDigits : 1;
  return row;
}

int64_t prologue_bytes(int64_t k) { return align64(words(k) * kWordBits * (4 + kFloatDigits)); }

int64_t block_bytes(const Product& p) {
  int64_t plane_words = words(p.act.k) * p.w.bits * kTile;
  // A prepared tensor is read where it is, but for planes made of its fields.
  if (p.w.prepared) return p.method == Method::kPlanes && p.w.bits > 1 ? 4 * plane_words : 0;
  return 4 * plane_words + 8 * p.w.groups * kTile;
}

}  // namespace anyprec::cpu

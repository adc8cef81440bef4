// From sums to results: scales, offsets, bias, cast.
#pragma once

#include "tiles.h"
#include "values.cuh"

namespace anyprec::cuda {

// The part of the result that a lane has: columns n, n + 1 of a strip from column(strip) on, rows
// m, m + 1 of a slice from row(slice) on. Sum c of a strip and a slice is that of n + c / 2 and
// m + c % 2.
struct Place {
  int first_column, first_row;

  __device__ int column(int strip) const { return first_column + 16 * strip; }
  __device__ int row(int slice) const { return first_row + 8 * slice; }
};

// What sums over a group are multiplied by: y += column_scale row_scale T + column_offset row_sum.
template <int kStrips, int kSlices>
struct Factors {
  float scales[kStrips][2], offsets[kStrips][2];
  float act_scales[kSlices][2], act_sums[kSlices][2];

  // For sums T of p u_w and P of p: y = a (2 s T + offset P), where the offset is that of code 0, and
  // -s L if there are none. P is left out unless `with_sums`.
  template <int kBits>
  __device__ void load_codes(const Gemm& p, const Place& at, int group, bool with_sums) {
    load_columns(p, at, group);
    for_all(scales, [&](int i, int j) {
      if (p.offsets == nullptr) offsets[i][j] = -scales[i][j] * max_level(kBits);
      scales[i][j] *= 2;
    });
    const float* row_scales = p.act_scales + int64_t{p.act_groups == 1 ? 0 : group} * p.m;
    const auto* row_sums = static_cast<const int32_t*>(p.act_sums) + int64_t{group} * p.m;
    for_all(act_scales, [&](int i, int j) {
      int m = stored_row(p, at, i, j);
      act_scales[i][j] = row_scales[m];
      float sum = static_cast<float>(row_sums[m]);
      act_sums[i][j] = with_sums ? act_scales[i][j] * sum : 0.0f;
    });
  }

  // For sums T of x q_w and P of x: y = s T + centre P, where the centre of the grid is s L + offset,
  // and 0 if there are no offsets.
  template <int kBits>
  __device__ void load_floats(const Gemm& p, const Place& at, int group, bool with_sums) {
    load_columns(p, at, group);
    with_sums = with_sums && p.offsets != nullptr;
    for_all(scales, [&](int i, int j) {
      offsets[i][j] = fmaf(scales[i][j], max_level(kBits), offsets[i][j]);
    });
    for_all(act_scales, [&](int i, int j) {
      act_scales[i][j] = 1;
      int64_t where = int64_t{group} * p.m + stored_row(p, at, i, j);
      act_sums[i][j] = with_sums ? static_cast<const float*>(p.act_sums)[where] : 0.0f;
    });
  }

  __device__ float add(float y, int strip, int slice, int c, float sum) const {
    int column = c / 2, row = c % 2;
    y = fmaf(act_scales[slice][row] * scales[strip][column], sum, y);
    return fmaf(offsets[strip][column], act_sums[slice][row], y);
  }

 private:
  template <int kCount, typename F>
  __device__ static void for_all(const float (&)[kCount][2], const F& f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) f(i, j);
    }
  }

  // Rows past the end are computed like the last one, and not stored.
  __device__ static int stored_row(const Gemm& p, const Place& at, int slice, int row) {
    return min(at.row(slice) + row, p.m - 1);
  }

  __device__ void load_columns(const Gemm& p, const Place& at, int group) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      int n = at.column(i);
      scales[i][0] = scales[i][1] = offsets[i][0] = offsets[i][1] = 0;
      if (n >= p.n) continue;
      int64_t where = (int64_t{n / kTile} * p.groups + group) * kTile + n % kTile;
      load_pack(p.scale_dtype, p.scales, where, scales[i]);
      if (p.offsets != nullptr) load_pack(p.offset_dtype, p.offsets, where, offsets[i]);
    }
  }
};

// Calls f(strip, slice, c) for each sum of a lane.
template <int kStrips, int kSlices, typename F>
__device__ inline void for_sums(const F& f) {
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int c = 0; c < 4; ++c) f(i, s, c);
    }
  }
}

// Writes value(strip, slice, c) to the result, or to this block's part of a split one.
template <int kStrips, int kSlices, typename Value>
__device__ inline void store(const Gemm& p, const Place& at, const Value& value) {
  bool whole = p.splits == 1, aligned = p.n % 2 == 0;
  int64_t first = whole ? 0 : int64_t{blockIdx.y} * p.m * p.n;
  DType dtype = whole ? p.out_dtype : DType::kF32;
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
    int n = at.column(i), count = min(p.n - n, 2);
    if (count <= 0) continue;
    float bias[2] = {};
    if (whole && p.bias != nullptr) {
      with_values(p.bias_dtype, p.bias, [&](auto* b, bool half) {
        bias[0] = to_float(b[n], half);
        bias[1] = count == 2 ? to_float(b[n + 1], half) : 0.0f;
      });
    }
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        int m = at.row(s) + row;
        if (m >= p.m) continue;
        const float y[2] = {value(i, s, row) + bias[0], value(i, s, 2 + row) + bias[1]};
        store_pack(dtype, p.out, first + int64_t{m} * p.n + n, y, count, aligned);
      }
    }
  }
}

// Writes sum q_x q_w = unit (2 T - L P) of a group, where sum(strip, slice, c) is T.
template <int kBits, int kStrips, int kSlices, typename Sum>
__device__ inline void store_integers(const Gemm& p, const Place& at, int group, int unit,
                                      const Sum& sum) {
  auto* out = static_cast<int32_t*>(p.out);
  for_sums<kStrips, kSlices>([&](int i, int s, int c) {
    int n = at.column(i) + c / 2, m = at.row(s) + c % 2;
    if (n >= p.n || m >= p.m) return;
    uint32_t all = static_cast<const uint32_t*>(p.act_sums)[int64_t{group} * p.m + m];
    uint32_t odd = 2 * static_cast<uint32_t>(sum(i, s, c)) - max_level(kBits) * all;
    out[(int64_t{m} * p.n + n) * p.groups + group] = static_cast<int32_t>(unit * odd);
  });
}

}  // namespace anyprec::cuda

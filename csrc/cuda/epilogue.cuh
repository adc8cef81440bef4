// From integer sums to results: scales, offsets, bias, cast.
#pragma once

#include "tiles.h"
#include "values.cuh"

namespace anyprec::cuda {

// The part of the result that a lane has: columns n .. n + 3 of unit u are from column(u) on, rows
// m, m + 1 of slice s from row(s) on.
struct Place {
  int first_column, first_row;

  __device__ int column(int u) const { return first_column + 32 * u; }
  __device__ int row(int s) const { return first_row + 8 * s; }
};

// What sums over a group are multiplied by. With offsets the value of a code u is 2 s u + offset,
// without 2 s u - s L.
template <int kUnits, int kSlices>
struct Factors {
  float scales[kUnits][4], offsets[kUnits][4];
  float act_scales[kSlices][2], sums[kSlices][2];

  // For products of codes: y += a (2 s T + offset P), where T = sum p u and P = sum p.
  template <int kBits>
  __device__ void load_codes(const Gemm& p, const Place& at, int group, bool with_sums) {
    load_columns(p, at, group);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p.offsets == nullptr) offsets[u][i] = -scales[u][i] * max_level(kBits);
        scales[u][i] *= 2;
      }
    }
    int act_group = p.act_groups == 1 ? 0 : group;
    for_rows(p, at, [&](int s, int i, int m) {
      act_scales[s][i] = p.act_scales[int64_t{act_group} * p.m + m];
      int32_t sum = static_cast<const int32_t*>(p.act_sums)[int64_t{group} * p.m + m];
      sums[s][i] = with_sums ? act_scales[s][i] * static_cast<float>(sum) : 0;
    });
  }

  // For products of floats: y += s T + (offset + s L) P, where T = sum x q and P = sum x.
  template <int kBits>
  __device__ void load_floats(const Gemm& p, const Place& at, int group, bool with_sums) {
    load_columns(p, at, group);
    with_sums = with_sums && p.offsets != nullptr;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) offsets[u][i] = fmaf(scales[u][i], max_level(kBits), offsets[u][i]);
    }
    for_rows(p, at, [&](int s, int i, int m) {
      act_scales[s][i] = 1;
      sums[s][i] =
          with_sums ? static_cast<const float*>(p.act_sums)[int64_t{group} * p.m + m] : 0.0f;
    });
  }

  // y += the part of a group whose sums are sum(u, s, half, c).
  template <typename Sum>
  __device__ void add(float (&y)[kUnits][kSlices][2][4], const Sum& sum) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            y[u][s][half][c] = add_one(y[u][s][half][c], u, s, half, c, sum(u, s, half, c));
          }
        }
      }
    }
  }

  __device__ float add_one(float y, int u, int s, int half, int c, float sum) const {
    int column = 2 * half + c / 2, row = c % 2;
    y = fmaf(act_scales[s][row] * scales[u][column], sum, y);
    return fmaf(offsets[u][column], sums[s][row], y);
  }

 private:
  __device__ void load_columns(const Gemm& p, const Place& at, int group) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      int n = at.column(u);
#pragma unroll
      for (int i = 0; i < 4; ++i) scales[u][i] = offsets[u][i] = 0;
      if (n >= p.n) continue;
      int64_t where = (int64_t{n / kTile} * p.groups + group) * kTile + n % kTile;
      load_four(p.scale_dtype, p.scales, where, scales[u]);
      if (p.offsets != nullptr) load_four(p.offset_dtype, p.offsets, where, offsets[u]);
    }
  }

  template <typename Load>
  __device__ static void for_rows(const Gemm& p, const Place& at, const Load& load) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int m = at.row(s) + i;
        load(s, i, m < p.m ? m : p.m - 1);  // rows past the end are not stored
      }
    }
  }
};

// Writes value(u, s, half, c) of the lane to the result, or to its part of a split one.
template <int kUnits, int kSlices, typename Value>
__device__ inline void store(const Gemm& p, const Place& at, int split, const Value& value) {
  bool whole = p.splits == 1, aligned = p.n % 4 == 0;
  int64_t first = whole ? 0 : int64_t{split} * p.m * p.n;
  DType dtype = whole ? p.out_dtype : DType::kF32;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    int n = at.column(u), count = p.n - n < 4 ? p.n - n : 4;
    if (count <= 0) continue;
    float bias[4] = {};
    if (whole && p.bias != nullptr) {
      with_dtype(p.bias_dtype, p.bias, [&](auto* b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) bias[i] = i < count ? to_float(b[n + i]) : 0.0f;
      });
    }
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        int m = at.row(s) + row;
        if (m >= p.m) continue;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = value(u, s, i / 2, 2 * (i % 2) + row) + bias[i];
        store_four(dtype, p.out, first + int64_t{m} * p.n + n, y, count, aligned);
      }
    }
  }
}

// Writes sum q_x q_w = unit (2 T - L P) of a group, where sum(u, s, half, c) is T.
template <int kBits, int kUnits, int kSlices, typename Sum>
__device__ inline void store_integers(const Gemm& p, const Place& at, int group, int unit,
                                      const Sum& sum) {
  auto* out = static_cast<int32_t*>(p.out);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int n = at.column(u) + 2 * half + c / 2, m = at.row(s) + c % 2;
          if (n >= p.n || m >= p.m) continue;
          uint32_t all = static_cast<const uint32_t*>(p.act_sums)[int64_t{group} * p.m + m];
          uint32_t twice = 2 * static_cast<uint32_t>(sum(u, s, half, c)) - max_level(kBits) * all;
          out[(int64_t{m} * p.n + n) * p.groups + group] = static_cast<int32_t>(unit * twice);
        }
      }
    }
  }
}

}  // namespace anyprec::cuda

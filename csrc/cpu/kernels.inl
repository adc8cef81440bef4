// The kernels, written once over the vector operations that an instruction set provides.
//
// The including file defines `Isa` in an anonymous namespace first (portable.cc lists what it
// must have). A vector holds one 32-bit lane for each of Isa::kLanes output columns, so a product
// needs no horizontal sums, and scales and offsets apply lane by lane. Weights are expanded from
// planes once for each panel of K and used for up to kMaxRows rows of activations.
// docs/format.md derives the integer identities.

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

// ---------------------------------------------------------------------------------------------
// Prologue: rotate, scale, round, pack, sum

inline void hadamard(float* x, int64_t n, int64_t block) {
  for (int64_t h = 1; h < block; h *= 2) {
    for (int64_t i = 0; i < n; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
  float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < n; ++i) x[i] *= norm;
}

// Row m as float32, rotated if asked, zero up to whole words.
inline void load_row(const Activations& a, int64_t m, float* row) {
  with_dtype(a.dtype, a.x, [&](auto* x) {
    x += m * a.k;
    for (int64_t i = 0; i < a.k; ++i) row[i] = to_float(x[i]);
  });
  for (int64_t i = a.k; i < words(a.k) * kWordBits; ++i) row[i] = 0;
  if (a.block == 0) return;
  for (int64_t i = 0; i < a.k; ++i) {
    row[i] = (a.signs[i / kWordBits] >> (i % kWordBits)) & 1 ? -row[i] : row[i];
  }
  hadamard(row, a.k, a.block);
}

// absmax / act_max_level; 0 if too small, NaN if too large or not finite. As unsigned integers,
// magnitudes keep their order, and infinity and NaN come out largest.
inline float absmax_scale(const float* x, int64_t n, int bits) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffffu;
    largest = u > largest ? u : largest;
  }
  float absmax;
  std::memcpy(&absmax, &largest, 4);
  float scale = absmax * static_cast<float>(1.0 / act_max_level(bits));
  if (!(scale <= kMaxScale)) return __builtin_nanf("");
  return scale >= kMinScale ? scale : 0.0f;
}

// See encode() and act_encode() in jax_anyprec/format.py.
inline void encode(const float* x, int64_t n, float scale, int bits, uint8_t* codes) {
  float inverse = scale >= kMinScale && scale <= kMaxScale ? 0.5f / scale : 0.0f;
  int half = 1 << (bits - 1);
  bool has_zero = bits >= kZeroBits;
  float low = static_cast<float>(has_zero - half), high = static_cast<float>(half - 1);
  for (int64_t i = 0; i < n; ++i) {
    float level = x[i] * inverse;
    float magnitude = __builtin_fabsf(level);
    float floor = magnitude < kZeroLevel ? 0.0f : __builtin_floorf(level);
    level = has_zero ? __builtin_rintf(level) : floor;
    level = level >= low ? level : low;
    level = level <= high ? level : high;
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(level) + half);
  }
}

inline void quantize_row(const Activations& a, const float* row, uint8_t* codes, float* scales) {
  if (a.k == 0) {
    scales[0] = 0;
    return;
  }
  for (int64_t begin = 0, g = 0; begin < a.k; begin += a.group_size, ++g) {
    scales[g] = absmax_scale(row + begin, a.group_size, a.bits);
    encode(row + begin, a.group_size, scales[g], a.bits, codes + begin);
  }
}

// Codes uint8[words * 32], zero past k, to the payload and sums of row m.
inline void store_codes(const Product& p, int64_t m, const uint8_t* codes) {
  int32_t* sums = row_part_mut<int32_t>(p, m, p.row.sums);
  for (int64_t s = 0; s < p.segment_count; ++s) {
    const Segment& seg = p.segments[s];
    const uint8_t* c = codes + static_cast<int64_t>(seg.word) * kWordBits;
    int32_t sum = 0;
    for (int i = 0; i < seg.k; ++i) sum += c[i];
    sums[s] = sum;
  }
  int64_t nwords = words(p.act.k);
  if (p.method == Method::kPlanes) {
    uint32_t* planes = row_part_mut<uint32_t>(p, m, 0);
    for (int i = 0; i < p.act.bits; ++i) {
      for (int64_t w = 0; w < nwords; ++w) {
        planes[i * nwords + w] = Isa::pack_word(codes + w * kWordBits, p.act.bits - 1 - i);
      }
    }
  } else {
    uint8_t* out = row_part_mut<uint8_t>(p, m, 0);
    uint8_t bias = p.act.bits == 8 ? 0x80 : 0;  // xor: minus 128 as a signed byte
    for (int64_t i = 0; i < nwords * kWordBits; ++i) out[i] = codes[i] ^ bias;
  }
}

void prologue(const Product& p, int64_t m, float* scratch) {
  const Activations& a = p.act;
  if (p.method == Method::kFloat) {
    float* row = row_part_mut<float>(p, m, 0);
    load_row(a, m, row);
    float* sums = row_part_mut<float>(p, m, p.row.sums);
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const float* x = row + static_cast<int64_t>(p.segments[s].word) * kWordBits;
      float sum = 0;
      for (int i = 0; i < p.segments[s].k; ++i) sum += x[i];
      sums[s] = sum;
    }
    return;
  }
  load_row(a, m, scratch);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + words(a.k) * kWordBits);
  quantize_row(a, scratch, codes, row_part_mut<float>(p, m, p.row.scales));
  for (int64_t i = a.k; i < words(a.k) * kWordBits; ++i) codes[i] = 0;
  store_codes(p, m, codes);
}

void prologue_codes(const Product& p, int64_t m, const uint8_t* codes) { store_codes(p, m, codes); }

void quantize(const Activations& a, int64_t m, float* scratch, uint8_t* codes, float* scales) {
  load_row(a, m, scratch);
  quantize_row(a, scratch, codes, scales);
}

// ---------------------------------------------------------------------------------------------
// Weights of one tile and one panel, expanded

struct Panel {
  const Segment* segments;
  int count;                       // segments
  V words[kMaxBits][kPanelWords];  // planes, for Method::kPlanes
  V quads[kPanelWords * 8];        // four codes a lane, for kCodes and kFloat
  V sums[kPanelWords];             // sum of codes of each segment
};

// Segments from `first` that fit one panel.
inline int panel_size(const Product& p, int64_t first) {
  int count = 0, used = 0;
  while (first + count < p.segment_count && used + p.segments[first + count].words <= kPanelWords) {
    used += p.segments[first + count++].words;
  }
  return count;
}

template <int W>
void load_panel(const Product& p, int64_t n0, Panel& panel) {
  int64_t nwords = words(p.act.k);
  const Segment& last = panel.segments[panel.count - 1];
  int first_word = panel.segments[0].word;
  int total = last.word + last.words - first_word;
  int rows = static_cast<int>(min64(L, p.w.n - n0));
  for (int j = 0; j < W; ++j) {
    const uint32_t* plane = p.w.planes + (j * p.w.n + n0) * nwords + first_word;
    Isa::load_words(plane, nwords, rows, total, panel.words[j]);
    // The same panel of the next tile: rows are too far apart for the hardware to see it coming.
    for (int64_t n = L; n < min64(2 * L, p.w.n - n0); ++n) __builtin_prefetch(plane + n * nwords);
  }
  for (int s = 0, t = 0; s < panel.count; ++s) {
    V sum = Isa::zero();
    for (int end = t + panel.segments[s].words; t < end; ++t) {
      V word_sum = Isa::zero();
      for (int j = 0; j < W; ++j) {
        word_sum = Isa::add(Isa::add(word_sum, word_sum), Isa::popcount(panel.words[j][t]));
      }
      sum = Isa::add(sum, word_sum);
    }
    panel.sums[s] = sum;
  }
  if (p.method == Method::kPlanes) return;
  for (int t = 0; t < total; ++t) {
    V planes[W];
    for (int j = 0; j < W; ++j) planes[j] = panel.words[j][t];
    Isa::expand<W>(planes, panel.quads + t * 8);
  }
}

void load_panel(const Product& p, int64_t n0, Panel& panel) {
  switch (p.w.bits) {
    case 1: return load_panel<1>(p, n0, panel);
    case 2: return load_panel<2>(p, n0, panel);
    case 3: return load_panel<3>(p, n0, panel);
    case 4: return load_panel<4>(p, n0, panel);
    case 5: return load_panel<5>(p, n0, panel);
    case 6: return load_panel<6>(p, n0, panel);
    case 7: return load_panel<7>(p, n0, panel);
    case 8: return load_panel<8>(p, n0, panel);
  }
}

// Scales or offsets of a panel: out[s] lane n is element [n0 + n][group of segment s].
void load_group_values(const Product& p, const void* data, DType dtype, int64_t n0,
                       const Panel& panel, F* out) {
  alignas(64) float values[L][kPanelWords];
  int64_t first = panel.segments[0].group;
  int rows = static_cast<int>(min64(L, p.w.n - n0));
  // More than one segment in a panel means one segment a group: consecutive values of each row.
  with_dtype(dtype, data, [&](auto* x) {
    for (int n = 0; n < rows; ++n) {
      auto* row = x + (n0 + n) * p.w.groups + first;
      if (panel.count == kPanelWords) {
        widen8(row, values[n]);
      } else {
        for (int s = 0; s < panel.count; ++s) values[n][s] = to_float(row[s]);
      }
    }
  });
  V lanes[kPanelWords];
  Isa::load_words(reinterpret_cast<const uint32_t*>(values), kPanelWords, rows, panel.count, lanes);
  for (int s = 0; s < panel.count; ++s) out[s] = Isa::as_float(lanes[s]);
}

// ---------------------------------------------------------------------------------------------
// Inner products of R rows with the tile over one segment

// sum u_w c_x, where c_x is the code, at 8 bits minus 128.
template <int R>
inline void dot_codes(const Product& p, int64_t m, const Panel& panel, const Segment& seg,
                      V (&acc)[R]) {
  constexpr int kChains = R < 4 ? 4 / R : 1;  // independent sums hide the product's latency
  const int8_t* x[R];
  V sums[R][kChains];
  for (int r = 0; r < R; ++r) {
    x[r] = row_part<int8_t>(p, m + r, 0) + static_cast<int64_t>(seg.word) * kWordBits;
    for (V& sum : sums[r]) sum = Isa::zero();
  }
  const V* quads = panel.quads + (seg.word - panel.segments[0].word) * 8;
  for (int t = 0; t < seg.words; ++t) {
#pragma GCC unroll 8
    for (int i = t * 8; i < t * 8 + 8; ++i) {
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x[r] + 4 * i, 4);
        V& sum = sums[r][i % kChains];
        sum = Isa::dot4(sum, quads[i], four);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    acc[r] = sums[r][0];
    for (int c = 1; c < kChains; ++c) acc[r] = Isa::add(acc[r], sums[r][c]);
  }
}

// sum u_w u_x by and + popcount over pairs of planes.
template <int R>
inline void dot_planes(const Product& p, int64_t m, const Panel& panel, const Segment& seg,
                       V (&acc)[R]) {
  int64_t nwords = words(p.act.k);
  int t0 = seg.word - panel.segments[0].word;
  for (int r = 0; r < R; ++r) acc[r] = Isa::zero();
  for (int i = 0; i < p.act.bits; ++i) {
    for (int j = 0; j < p.w.bits; ++j) {
      V counts[R];
      for (int r = 0; r < R; ++r) counts[r] = Isa::zero();
      for (int t = 0; t < seg.words; ++t) {
        V w = panel.words[j][t0 + t];
        for (int r = 0; r < R; ++r) {
          uint32_t x = row_part<uint32_t>(p, m + r, 0)[i * nwords + seg.word + t];
          V common = Isa::bit_and(w, Isa::broadcast(static_cast<int32_t>(x)));
          counts[r] = Isa::add(counts[r], Isa::popcount(common));
        }
      }
      int shift = p.act.bits - 1 - i + p.w.bits - 1 - j;
      for (int r = 0; r < R; ++r) acc[r] = Isa::add(acc[r], Isa::shl(counts[r], shift));
    }
  }
}

// sum u_w x in float32.
template <int R>
inline void dot_floats(const Product& p, int64_t m, const Panel& panel, const Segment& seg,
                       F (&acc)[R]) {
  const float* x[R];
  for (int r = 0; r < R; ++r) {
    x[r] = row_part<float>(p, m + r, 0) + static_cast<int64_t>(seg.word) * kWordBits;
    acc[r] = Isa::fzero();
  }
  const V* quads = panel.quads + (seg.word - panel.segments[0].word) * 8;
  for (int i = 0; i < seg.words * 8; ++i) {
    for (int b = 0; b < 4; ++b) {
      F w = Isa::byte_to_float(quads[i], b);
      for (int r = 0; r < R; ++r) acc[r] = Isa::fma(w, Isa::fbroadcast(x[r][4 * i + b]), acc[r]);
    }
  }
}

// With acc = sum u_w c_x (codes) or sum u_w u_x (planes), 4 acc + shared_term is sum 2 u_w q_x.
inline V shared_term(const Product& p, V code_sums) {
  int zero_point = p.method == Method::kCodes && p.act.bits == 8 ? 128 : 0;
  int factor = 4 * zero_point - 2 * act_centre(p.act.bits);
  return Isa::mul(code_sums, Isa::broadcast(factor));
}

template <int R>
inline void dot_ints(const Product& p, int64_t m, const Panel& panel, const Segment& seg,
                     V (&acc)[R]) {
  if (p.method == Method::kPlanes) {
    dot_planes<R>(p, m, panel, seg, acc);
  } else {
    dot_codes<R>(p, m, panel, seg, acc);
  }
}

// sum of q_x over a segment.
inline int32_t level_sum(const Product& p, int64_t m, int64_t s) {
  return 2 * row_part<int32_t>(p, m, p.row.sums)[s] - p.segments[s].k * act_centre(p.act.bits);
}

// ---------------------------------------------------------------------------------------------
// Epilogues

struct Tile {
  alignas(64) float y[kMaxRows][L];
};

// y += s_x (s_w sum q_x q_w), with offsets y += s_x (s_w sum q_x 2 u_w + offset sum q_x).
template <int R>
void add_int_panel(const Product& p, int64_t m, int64_t m0, const Panel& panel, const F* scales,
                   const F* offsets, Tile& tile) {
  F y[R];
  for (int r = 0; r < R; ++r) y[r] = Isa::load(tile.y[m + r - m0]);
  for (int s = 0; s < panel.count; ++s) {
    const Segment& seg = panel.segments[s];
    V acc[R];
    dot_ints<R>(p, m, panel, seg, acc);
    V shared = shared_term(p, panel.sums[s]);
    int64_t act_group = static_cast<int64_t>(seg.word) * kWordBits / p.act.group_size;
    for (int r = 0; r < R; ++r) {
      int32_t q_sum = level_sum(p, m + r, &seg - p.segments);
      F act_scale = Isa::fbroadcast(row_part<float>(p, m + r, p.row.scales)[act_group]);
      V dot = Isa::add(Isa::shl(acc[r], 2), shared);
      F sum;
      if (p.w.offsets == nullptr) {
        dot = Isa::add(dot, Isa::broadcast(-max_level(p.w.bits) * q_sum));
        sum = Isa::fmul(scales[s], Isa::to_float(dot));
      } else {
        F centre = Isa::fmul(offsets[s], Isa::fbroadcast(static_cast<float>(q_sum)));
        sum = Isa::fma(scales[s], Isa::to_float(dot), centre);
      }
      y[r] = Isa::fma(sum, act_scale, y[r]);
    }
  }
  for (int r = 0; r < R; ++r) Isa::store(tile.y[m + r - m0], y[r]);
}

// y += s_w sum x q_w, with offsets y += s_w sum x 2 u_w + offset sum x.
template <int R>
void add_float_panel(const Product& p, int64_t m, int64_t m0, const Panel& panel, const F* scales,
                     const F* offsets, Tile& tile) {
  F minus_level = Isa::fbroadcast(static_cast<float>(-max_level(p.w.bits)));
  F y[R];
  for (int r = 0; r < R; ++r) y[r] = Isa::load(tile.y[m + r - m0]);
  for (int s = 0; s < panel.count; ++s) {
    const Segment& seg = panel.segments[s];
    F acc[R];
    dot_floats<R>(p, m, panel, seg, acc);
    F twice = Isa::fadd(scales[s], scales[s]);
    F per_sum = p.w.offsets == nullptr ? Isa::fmul(scales[s], minus_level) : offsets[s];
    for (int r = 0; r < R; ++r) {
      float sum = row_part<float>(p, m + r, p.row.sums)[&seg - p.segments];
      y[r] = Isa::fma(per_sum, Isa::fbroadcast(sum), y[r]);
      y[r] = Isa::fma(twice, acc[r], y[r]);
    }
  }
  for (int r = 0; r < R; ++r) Isa::store(tile.y[m + r - m0], y[r]);
}

template <int R>
using Rows = std::integral_constant<int, R>;

// Calls step(m, R) over rows m0..m1 in blocks of R = Isa::kRows, then 4, 2 and 1.
template <typename Step>
inline void for_row_blocks(int64_t m0, int64_t m1, Step&& step) {
  int64_t m = m0;
  for (; m + Isa::kRows <= m1; m += Isa::kRows) step(m, Rows<Isa::kRows>{});
  for (; m + 4 <= m1; m += 4) step(m, Rows<4>{});
  for (; m + 2 <= m1; m += 2) step(m, Rows<2>{});
  for (; m < m1; ++m) step(m, Rows<1>{});
}

void store_tile(const Product& p, int64_t n0, int64_t m0, int64_t m1, const Tile& tile) {
  int rows = static_cast<int>(min64(L, p.w.n - n0));
  alignas(64) float bias[L] = {};
  if (p.bias != nullptr) {
    with_dtype(p.bias_dtype, p.bias, [&](auto* b) {
      for (int n = 0; n < rows; ++n) bias[n] = to_float(b[n0 + n]);
    });
  }
  with_dtype(p.out_dtype, p.out, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    for (int64_t m = m0; m < m1; ++m) {
      T* out = const_cast<T*>(typed) + m * p.w.n + n0;
      const float* y = tile.y[m - m0];
      for (int n = 0; n < rows; ++n) from_float(y[n] + bias[n], out[n]);
    }
  });
}

void product(const Product& p, int64_t tile_index, int64_t m0, int64_t m1) {
  int64_t n0 = tile_index * L;
  F scales[kPanelWords], offsets[kPanelWords];
  int loaded_group = -1;
  Tile tile;
  std::memset(&tile, 0, sizeof(float) * L * static_cast<size_t>(m1 - m0));
  Panel panel;
  for (int64_t first = 0; first < p.segment_count; first += panel.count) {
    panel.segments = p.segments + first;
    panel.count = panel_size(p, first);
    load_panel(p, n0, panel);
    // A long group goes on over several panels, each one segment.
    bool same_group = panel.count == 1 && panel.segments[0].group == loaded_group;
    loaded_group = panel.segments[panel.count - 1].group;
    if (!same_group) load_group_values(p, p.w.scales, p.w.scale_dtype, n0, panel, scales);
    if (!same_group && p.w.offsets != nullptr) {
      load_group_values(p, p.w.offsets, p.w.offset_dtype, n0, panel, offsets);
    }
    for_row_blocks(m0, m1, [&](int64_t m, auto r) {
      if (p.method == Method::kFloat) {
        add_float_panel<r.value>(p, m, m0, panel, scales, offsets, tile);
      } else {
        add_int_panel<r.value>(p, m, m0, panel, scales, offsets, tile);
      }
    });
  }
  store_tile(p, n0, m0, m1, tile);
}

void int_product(const Product& p, int64_t tile_index, int64_t m0, int64_t m1) {
  int64_t n0 = tile_index * L;
  int rows = static_cast<int>(min64(L, p.w.n - n0));
  Panel panel;
  for (int64_t first = 0; first < p.segment_count; first += panel.count) {
    panel.segments = p.segments + first;
    panel.count = panel_size(p, first);
    load_panel(p, n0, panel);
    for (int s = 0; s < panel.count; ++s) {
      const Segment& seg = panel.segments[s];
      V shared = shared_term(p, panel.sums[s]);
      for_row_blocks(m0, m1, [&](int64_t m, auto row_block) {
        constexpr int R = row_block.value;
        V acc[R];
        dot_ints<R>(p, m, panel, seg, acc);
        for (int r = 0; r < R; ++r) {
          V dot = Isa::add(Isa::shl(acc[r], 2), shared);
          int32_t q_sum = level_sum(p, m + r, first + s);
          dot = Isa::add(dot, Isa::broadcast(-max_level(p.w.bits) * q_sum));
          alignas(64) int32_t lanes[L];
          Isa::store_ints(lanes, dot);
          int32_t* out = static_cast<int32_t*>(p.out) + (m + r) * p.w.n * p.w.groups;
          for (int n = 0; n < rows; ++n) out[(n0 + n) * p.w.groups + seg.group] += lanes[n];
        }
      });
    }
  }
}

constexpr Kernels kKernels = {Isa::kName, L, prologue, prologue_codes, quantize, product,
                              int_product};

}  // namespace
}  // namespace anyprec::cpu

// Products of R rows of activations with one block of columns, and their epilogues.

namespace anyprec::cpu {
namespace {

template <int X>
using Int = std::integral_constant<int, X>;

// --- Reading ahead ---

// With few rows of activations, weights are read faster than a processor's own prefetching follows,
// which stops at each page and at each switch between fields and scales. Tiles are one stream, so
// what is ahead of a tile is the next one; past the end of the weights nothing happens.
constexpr int kFieldsAhead = 8192, kScalesAhead = 1024;  // bytes, the best of those measured

inline void prefetch(const void* at, int ahead) {
  __builtin_prefetch(static_cast<const char*>(at) + ahead, 0, 1);
}

template <int W>
ANYPREC_INLINE void prefetch_fields(const uint32_t* at) {
  for (int j = 0; j < W; ++j) prefetch(at + j * kTile, kFieldsAhead);
}

// --- Inner products over one segment ---

// Segments of fewer words don't repay what only helps long sums.
constexpr int kLongWords = 8;

// sum c (2 u_w - B) of one row, with fields left in place: a mask alone takes them out, the sums of
// each place are 2^place too large, and are put together at the end. The shifts that this spares
// are what limits decoding. For W of 1, 2 or 4.
template <int W, bool kLong>
ANYPREC_INLINE void dot_fields(const int8_t* x, int32_t x_sum, const uint32_t* const (&w)[NV],
                               int nwords, V (&t)[NV]) {
  // More places than chains would not fit the registers; more chains than places hide latency.
  constexpr int kChains = kLong ? 4 : 2, kPlaces = kLong && W < 4 ? 4 : 2;
  constexpr int kShare = kChains / kPlaces;
  constexpr int kTop = W * (kPlaces - 1);  // the sums of the last place are 2^kTop too large
  V sums[NV][kChains];
  for (auto& chains : sums) {
    for (V& chain : chains) chain = Isa::zero();
    chains[kChains - 1] = Isa::broadcast(-max_level(W) * x_sum * (1 << kTop) / 2);
  }
  for (int i = 0; i < nwords; ++i) {
    V fields[NV][W];
    for (int v = 0; v < NV; ++v) {
      load_fields<W>(w[v] + int64_t{i} * W * kTile, fields[v]);
      // One long stream of four bits is what processors follow by themselves.
      if (!kLong || W < 4) prefetch_fields<W>(w[v] + int64_t{i} * W * kTile);
    }
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      int32_t four;
      std::memcpy(&four, x + i * kWordBits + 4 * q, 4);
      V xs = Isa::broadcast(four);
      int place = q / W % kPlaces, word = q % W;
      V mask = Isa::broadcast(static_cast<int32_t>(max_level(W) * 0x01010101u << (place * W)));
      for (int v = 0; v < NV; ++v) {
        if (place == 0 && q / W > 0) fields[v][word] = Isa::shr(fields[v][word], W * kPlaces);
        V& chain = sums[v][place * kShare + q % kShare];
        chain = Isa::template dot4<8>(chain, Isa::bit_and(fields[v][word], mask), xs);
      }
    }
  }
  for (int v = 0; v < NV; ++v) {
    auto place_sum = [&](int place) {
      V sum = sums[v][place * kShare];
      for (int c = 1; c < kShare; ++c) sum = Isa::add(sum, sums[v][place * kShare + c]);
      return sum;
    };
    V sum = place_sum(kPlaces - 1);
    for (int place = kPlaces - 2; place > 0; --place) {
      sum = Isa::add(Isa::sar(sum, W), place_sum(place));
    }
    V twice = W == 1 ? sum : Isa::sar(sum, W - 1);
    t[v] = Isa::add(twice, Isa::shl(place_sum(0), 1));
  }
}

// t = sum c (2 u_w - B) of R rows, with the codes of each quad brought to the low bits of their
// bytes; one bit higher where that spares doubling the sums.
template <int W, int R>
ANYPREC_INLINE void dot_quads(const int8_t* const (&x)[R], const int32_t* const (&x_sums)[R],
                              const uint32_t* const (&w)[NV], int nwords, V (&t)[R][NV]) {
  // Independent sums hide the latency; reading eight bits takes longer than that.
  constexpr int kChains = W == 8 ? 1 : R == 1 ? 4 : R == 2 ? 2 : 1;
  constexpr bool kTwice = Isa::kScaledFields && W < 8;
  V constants[R], sums[R][NV][kChains];
  for (int r = 0; r < R; ++r) {
    constants[r] = Isa::broadcast(-max_level(W) * *x_sums[r]);
    for (auto& chains : sums[r]) {
      for (V& chain : chains) chain = Isa::zero();
      if (kTwice) chains[0] = constants[r];
    }
  }
  for (int i = 0; i < nwords; ++i) {
    V fields[NV][W];
    for (int v = 0; v < NV; ++v) {
      load_fields<W>(w[v] + int64_t{i} * W * kTile, fields[v]);
      if (R <= kFloatDigits) prefetch_fields<W>(w[v] + int64_t{i} * W * kTile);
    }
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      V codes[NV];
      for (int v = 0; v < NV; ++v) codes[v] = codes_of<W, kTwice>(fields[v], q);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x[r] + i * kWordBits + 4 * q, 4);
        V xs = Isa::broadcast(four);
        for (int v = 0; v < NV; ++v) {
          V& chain = sums[r][v][q % kChains];
          chain = Isa::template dot4<W>(chain, codes[v], xs);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < NV; ++v) {
      V sum = sums[r][v][0];
      for (int c = 1; c < kChains; ++c) sum = Isa::add(sum, sums[r][v][c]);
      t[r][v] = kTwice ? sum : Isa::add(Isa::add(sum, sum), constants[r]);
    }
  }
}

// t = sum c q_w for R parts of the workspace, where c are the integers of a part.
template <int W, int R>
ANYPREC_INLINE void dot_codes(const Product& p, int64_t part, const Block& b,
                              const Segment& seg, V (&t)[R][NV]) {
  const int8_t* x[R];
  for (int r = 0; r < R; ++r) {
    x[r] = in_part<int8_t>(p, part + r, 0) + int64_t{seg.word} * kWordBits;
  }
  const uint32_t* w[NV];
  for (int v = 0; v < NV; ++v) w[v] = b.words[v] + int64_t{seg.word} * W * kTile;
  const int32_t* x_sums[R];
  for (int r = 0; r < R; ++r) {
    x_sums[r] = in_part<int32_t>(p, part + r, p.row.sums) + (&seg - p.segments);
  }
  if constexpr (Isa::kScaledFields && R == 1 && (W == 1 || W == 2 || W == 4)) {
    return seg.words < kLongWords
               ? dot_fields<W, false>(x[0], *x_sums[0], w, seg.words, t[0])
               : dot_fields<W, true>(x[0], *x_sums[0], w, seg.words, t[0]);
  } else {
    dot_quads<W, R>(x, x_sums, w, seg.words, t);
  }
}

// t = sum q_x q_w by xor + popcount over pairs of planes: k A B - 2 sum 2^(i+j) popcount with the
// odd integers. Activations with a zero are one less, which takes away the sum of q_w.
template <int R>
inline void dot_planes(const Product& p, int64_t m, const Block& b, const Segment& seg,
                       V (&t)[R][NV]) {
  int64_t nwords = words(p.act.k);
  int bits = p.w.bits, level = max_level(bits);
  for (int v = 0; v < NV; ++v) {
    V constant = Isa::broadcast(seg.k * max_level(p.act.bits) * level);
    for (int r = 0; r < R; ++r) t[r][v] = constant;
  }
  for (int j = 0; j < bits; ++j) {
    const uint32_t* w[NV];
    for (int v = 0; v < NV; ++v) w[v] = b.words[v] + (int64_t{seg.word} * bits + j) * kTile;
    for (int i = 0; i < p.act.bits; ++i) {
      const uint32_t* x[R];
      for (int r = 0; r < R; ++r) {
        x[r] = in_part<uint32_t>(p, m + r, 0) + i * nwords + seg.word;
      }
      V counts[R][NV];
      for (auto& row : counts) {
        for (V& count : row) count = Isa::zero();
      }
#pragma GCC unroll 4
      for (int word = 0; word < seg.words; ++word) {
        V columns[NV];
        for (int v = 0; v < NV; ++v) {
          columns[v] = Isa::load_ints(w[v] + int64_t{word} * bits * kTile);
        }
        for (int r = 0; r < R; ++r) {
          V xs = Isa::broadcast(static_cast<int32_t>(x[r][word]));
          for (int v = 0; v < NV; ++v) {
            V differ = Isa::popcount(Isa::bit_xor(columns[v], xs));
            counts[r][v] = Isa::add(counts[r][v], differ);
          }
        }
      }
      V factor = Isa::broadcast(-(2 << (i + j)));
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < NV; ++v) t[r][v] = Isa::add(t[r][v], Isa::mul(counts[r][v], factor));
      }
    }
  }
  if (p.act.bits < kZeroBits) return;
  for (int v = 0; v < NV; ++v) {
    V w_sum = Isa::broadcast(-seg.k * level);
    for (int j = 0; j < bits; ++j) {
      const uint32_t* w = b.words[v] + (int64_t{seg.word} * bits + j) * kTile;
      for (int word = 0; word < seg.words; ++word) {
        V count = Isa::popcount(Isa::load_ints(w + int64_t{word} * bits * kTile));
        w_sum = Isa::add(w_sum, Isa::mul(count, Isa::broadcast(2 << j)));
      }
    }
    for (int r = 0; r < R; ++r) t[r][v] = Isa::sub(t[r][v], w_sum);
  }
}

// --- Epilogues ---

inline int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// L scales or offsets from element `at`.
inline F load_lanes(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kF32: return Isa::load(static_cast<const float*>(data) + at);
    case DType::kF16: return Isa::load_half(static_cast<const uint16_t*>(data) + at);
    case DType::kBF16: return Isa::load_bfloat(static_cast<const uint16_t*>(data) + at);
  }
  __builtin_unreachable();
}

inline void prefetch_scales(const Block& b, int64_t at) {
  prefetch(static_cast<const char*>(b.scales) + at * bytes_of(b.scale_dtype), kScalesAhead);
  if (b.offsets == nullptr) return;
  prefetch(static_cast<const char*>(b.offsets) + at * bytes_of(b.offset_dtype), kScalesAhead);
}

// What the epilogue needs of a segment: sum q_x q_w and sum q_x as floats.
template <int R>
struct Sums {
  F products[R][NV];
  float values[R];
};

template <int W, Method kMethod, int R>
ANYPREC_INLINE void segment_sums(const Product& p, int64_t m, const Block& b,
                                 const Segment& seg, Sums<R>& sums) {
  constexpr int kParts = kMethod == Method::kFloat ? kFloatDigits : 1;
  V t[R * kParts][NV];
  if constexpr (kMethod == Method::kPlanes) {
    dot_planes<R>(p, m, b, seg, t);
  } else {
    dot_codes<W, R * kParts>(p, m * kParts, b, seg, t);
  }
  for (int r = 0; r < R; ++r) {
    auto value = [&](int d) {
      int64_t part = (m + r) * kParts + d;
      return static_cast<float>(in_part<int32_t>(p, part, p.row.sums)[&seg - p.segments]);
    };
    // Digits from the most significant down.
    sums.values[r] = value(kParts - 1);
    for (int v = 0; v < NV; ++v) {
      sums.products[r][v] = Isa::to_float(t[r * kParts + kParts - 1][v]);
    }
    for (int d = kParts - 2; d >= 0; --d) {
      sums.values[r] = sums.values[r] * 256.0f + value(d);
      for (int v = 0; v < NV; ++v) {
        F digit = Isa::to_float(t[r * kParts + d][v]);
        sums.products[r][v] = Isa::fma(sums.products[r][v], Isa::fbroadcast(256.0f), digit);
      }
    }
  }
}

// y += s_x (s_w sum q_x q_w), with offsets y += s_x (s_w sum q_x q_w + centre sum q_x).
template <int R>
ANYPREC_INLINE void add_segment(const Product& p, int64_t m, const Block& b,
                                const Segment& seg, const Sums<R>& sums, F (&y)[R][NV]) {
  int64_t act_group = p.act.group_size == p.act.k ? 0 : seg.group;
  F scales[NV], centres[NV];
  for (int v = 0; v < NV; ++v) {
    int64_t at = b.scale_at[v] + int64_t{seg.group} * kTile;
    // Beside eight bits, scales are so few that the processor follows them itself.
    if (R == 1 && p.w.bits < kMaxBits) prefetch_scales(b, at);
    scales[v] = load_lanes(b.scales, b.scale_dtype, at);
    if (b.offsets == nullptr) continue;
    F level = Isa::fbroadcast(static_cast<float>(max_level(p.w.bits)));
    centres[v] = Isa::fma(scales[v], level, load_lanes(b.offsets, b.offset_dtype, at));
  }
  for (int r = 0; r < R; ++r) {
    const float* act_scales = in_part<float>(p, (m + r) * p.row.parts, p.row.scales);
    F act_scale = Isa::fbroadcast(act_scales[act_group]);
    F values = Isa::fbroadcast(sums.values[r]);
    for (int v = 0; v < NV; ++v) {
      F sum = Isa::fmul(scales[v], sums.products[r][v]);
      if (b.offsets != nullptr) sum = Isa::fma(centres[v], values, sum);
      y[r][v] = Isa::fma(sum, act_scale, y[r][v]);
    }
  }
}

// Calls step(m, R) over rows m0..m1 in pieces of R = kMost, a power of two, and then of smaller
// ones.
template <int kMost, typename Step>
inline void for_row_blocks(int64_t m, int64_t m1, Step&& step) {
  for (; m + kMost <= m1; m += kMost) step(m, Int<kMost>{});
  if constexpr (kMost > 1) for_row_blocks<kMost / 2>(m, m1, step);
}

// Vectors of the block that lie inside the matrix, the last perhaps in part.
inline int columns_left(const Product& p, int64_t n) {
  return static_cast<int>(n < p.w.n ? min64(L, p.w.n - n) : 0);
}

template <int R>
inline void store_rows(const Product& p, int64_t block, int64_t m, const F (&y)[R][NV]) {
  for (int v = 0; v < NV; ++v) {
    int64_t n = block * kColumns + v * L;
    int count = columns_left(p, n);
    alignas(64) float bias[L] = {};
    if (p.bias != nullptr) {
      with_dtype(p.bias_dtype, p.bias, [&](auto* b) {
        for (int i = 0; i < count; ++i) bias[i] = to_float(b[n + i]);
      });
    }
    for (int r = 0; r < R; ++r) {
      F result = Isa::fadd(y[r][v], Isa::load(bias));
      if (count == L && p.out_dtype == DType::kF32) {
        Isa::store(static_cast<float*>(p.out) + (m + r) * p.w.n + n, result);
        continue;
      }
      alignas(64) float values[L];
      Isa::store(values, result);
      with_dtype(p.out_dtype, p.out, [&](auto* typed) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        T* out = const_cast<T*>(typed) + (m + r) * p.w.n + n;
        for (int i = 0; i < count; ++i) from_float(values[i], out[i]);
      });
    }
  }
}

template <int W, Method kMethod>
void product_rows(const Product& p, const Block& b, int64_t block, int64_t m0, int64_t m1) {
  // Digits of float activations are rows of their own.
  constexpr int kMost = kMethod == Method::kFloat ? Isa::kRows / 4 : Isa::kRows;
  for_row_blocks<kMost>(m0, m1, [&](int64_t m, auto rows) {
    constexpr int R = decltype(rows)::value;
    F y[R][NV];
    for (auto& row : y) {
      for (F& value : row) value = Isa::fzero();
    }
    for (int64_t s = 0; s < p.segment_count; ++s) {
      Sums<R> sums;
      segment_sums<W, kMethod>(p, m, b, p.segments[s], sums);
      add_segment(p, m, b, p.segments[s], sums, y);
    }
    store_rows<R>(p, block, m, y);
  });
}

template <typename Call>
inline void with_bits(int bits, Call&& call) {
  switch (bits) {
    case 1: return call(Int<1>{});
    case 2: return call(Int<2>{});
    case 3: return call(Int<3>{});
    case 4: return call(Int<4>{});
    case 5: return call(Int<5>{});
    case 6: return call(Int<6>{});
    case 7: return call(Int<7>{});
    case 8: return call(Int<8>{});
  }
}

void product(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
  with_bits(p.w.bits, [&](auto bits) {
    constexpr int W = decltype(bits)::value;
    Block b = make_block<W>(p, block, scratch);
    switch (p.method) {
      case Method::kFloat: return product_rows<W, Method::kFloat>(p, b, block, m0, m1);
      case Method::kCodes: return product_rows<W, Method::kCodes>(p, b, block, m0, m1);
      // Its loops are over bits that are known at run time only.
      case Method::kPlanes: return product_rows<1, Method::kPlanes>(p, b, block, m0, m1);
    }
  });
}

template <int W, Method kMethod>
void int_product_rows(const Product& p, const Block& b, int64_t block, int64_t m0, int64_t m1) {
  V unit = Isa::broadcast(kMethod == Method::kCodes ? act_unit(p.act.bits) : 1);
  for_row_blocks<Isa::kRows>(m0, m1, [&](int64_t m, auto rows) {
    constexpr int R = decltype(rows)::value;
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const Segment& seg = p.segments[s];
      V t[R][NV];
      if constexpr (kMethod == Method::kPlanes) {
        dot_planes<R>(p, m, b, seg, t);
      } else {
        dot_codes<W, R>(p, m, b, seg, t);
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < NV; ++v) {
          int64_t n = block * kColumns + v * L;
          alignas(64) uint32_t lanes[L];
          Isa::store_ints(lanes, Isa::mul(t[r][v], unit));
          auto* out = static_cast<uint32_t*>(p.out) + ((m + r) * p.w.n + n) * p.w.groups;
          for (int i = 0; i < columns_left(p, n); ++i) out[i * p.w.groups + seg.group] += lanes[i];
        }
      }
    }
  });
}

void int_product(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
  with_bits(p.w.bits, [&](auto bits) {
    constexpr int W = decltype(bits)::value;
    Block b = make_block<W>(p, block, scratch);
    if (p.method == Method::kPlanes) {
      int_product_rows<1, Method::kPlanes>(p, b, block, m0, m1);
    } else {
      int_product_rows<W, Method::kCodes>(p, b, block, m0, m1);
    }
  });
}

constexpr Kernels kKernels = {Isa::kName, kColumns, prologue, prologue_codes, quantize, product,
                              int_product};

}  // namespace
}  // namespace anyprec::cpu

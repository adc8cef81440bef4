// Weights of one block of columns: where its product reads them, and the codes in their fields.

namespace anyprec::cpu {
namespace {

// Vectors of columns that a product handles at once.
constexpr int NV = Isa::kVectors;
constexpr int kColumns = NV * L;
static_assert(kTile % kColumns == 0);  // so a block lies in one tile

// Vector v of bit word j of word t is at words[v] + (t * bits + j) * kTile; its scale of group g is
// element scale_at[v] + g * kTile of `scales`, and so for offsets.
struct Block {
  const uint32_t* words[NV];
  const void* scales;
  const void* offsets;
  DType scale_dtype, offset_dtype;
  int64_t scale_at[NV];
};

// --- Bits to fields and back ---

// Swaps the high bits of x[i] with the low ones of x[i + D], in blocks of D bits.
template <int D, int C>
inline void swap_blocks(V* x) {
  if constexpr (D < C) {
    constexpr uint32_t kLow = D == 4 ? 0x0f0f0f0fu : D == 2 ? 0x33333333u : 0x55555555u;
    V low = Isa::broadcast(static_cast<int32_t>(kLow)), high = Isa::broadcast(~kLow);
    for (int i = 0; i < C; ++i) {
      if (i & D) continue;
      V a = x[i], b = x[i + D];
      x[i] = Isa::bit_or(Isa::bit_and(a, low), Isa::bit_and(Isa::shl(b, D), high));
      x[i + D] = Isa::bit_or(Isa::bit_and(Isa::shr(a, D), low), Isa::bit_and(b, high));
    }
  }
}

template <int C>
inline void swap_part(V* x) {
  swap_blocks<4, C>(x);
  swap_blocks<2, C>(x);
  swap_blocks<1, C>(x);
}

// Words of single bits, the low one first, to words of fields, or back.
template <int W>
inline void swap_fields(V* x) {
  if constexpr ((W & 8) != 0) swap_part<8>(x);
  if constexpr ((W & 4) != 0) swap_part<4>(x);
  if constexpr ((W & 2) != 0) swap_part<2>(x + (W & 4));
}

// Bits of quad q of a part of C bits whose words are x, moved up to bit `at` of each byte.
template <int C, int At>
inline V field(const V* x, int q) {
  if constexpr (C == 8) {
    return x[q];
  } else {
    int down = C * (q / C) - At;
    V moved = down > 0 ? Isa::shr(x[q % C], down) : down < 0 ? Isa::shl(x[q % C], -down) : x[q % C];
    return Isa::bit_and(moved, Isa::broadcast(((1 << C) - 1) * 0x01010101 << At));
  }
}

// Codes of indices q, q + 8, q + 16 and q + 24 of a word, a byte each, from bit `At` of it up.
template <int W, int At = 0>
inline V codes_of(const V* x, int q) {
  if constexpr ((W & 8) != 0) return field<8, At>(x, q);
  V codes = Isa::zero();
  if constexpr ((W & 4) != 0) codes = field<4, At>(x, q);
  if constexpr ((W & 2) != 0) codes = Isa::bit_or(codes, field<2, At + (W & 4)>(x + (W & 4), q));
  if constexpr ((W & 1) != 0) codes = Isa::bit_or(codes, field<1, At + (W & 6)>(x + (W & 6), q));
  return codes;
}

// --- From planes to a block ---

template <int W>
inline void load_fields(const uint32_t* at, V* x) {
  for (int j = 0; j < W; ++j) x[j] = Isa::load_ints(at + j * kTile);
}

// Columns n0 .. n0 + rows of planes, at most L, to bit words or fields at `out`.
template <int W>
void gather_columns(const Product& p, int64_t n0, int rows, bool fields, uint32_t* out) {
  int64_t nwords = words(p.act.k);
  for (int64_t t = 0; t < nwords; t += 8) {
    int count = static_cast<int>(min64(8, nwords - t));
    V x[W][8];
    for (int j = 0; j < W; ++j) {
      const uint32_t* plane = p.w.planes + ((W - 1 - j) * p.w.n + n0) * nwords + t;
      Isa::load_words(plane, nwords, rows, count, x[j]);
    }
    for (int i = 0; i < count; ++i) {
      V word[W];
      for (int j = 0; j < W; ++j) word[j] = x[j][i];
      if (fields) swap_fields<W>(word);
      for (int j = 0; j < W; ++j) Isa::store_ints(out + ((t + i) * W + j) * kTile, word[j]);
    }
  }
}

// Scales or offsets of columns n0 .. n0 + rows, as float[groups][kTile] at `out`.
void gather_groups(const Product& p, const void* data, DType dtype, int64_t n0, int rows,
                   float* out) {
  int64_t groups = p.w.groups;
  with_dtype(dtype, data, [&](auto* x) {
    for (int64_t g = 0; g < groups; g += 8) {
      int count = static_cast<int>(min64(8, groups - g));
      alignas(64) float values[L][8];
      for (int n = 0; n < rows; ++n) {
        auto* row = x + (n0 + n) * groups + g;
        if (count == 8) {
          widen8(row, values[n]);
        } else {
          for (int i = 0; i < count; ++i) values[n][i] = to_float(row[i]);
        }
      }
      V lanes[8];
      Isa::load_words(reinterpret_cast<const uint32_t*>(values), 8, rows, count, lanes);
      for (int i = 0; i < count; ++i) Isa::store(out + (g + i) * kTile, Isa::as_float(lanes[i]));
    }
  });
}

template <int W>
void fields_to_planes(const uint32_t* fields, int64_t nwords, uint32_t* out) {
  for (int64_t t = 0; t < nwords; ++t) {
    V x[W];
    load_fields<W>(fields + t * W * kTile, x);
    swap_fields<W>(x);
    for (int j = 0; j < W; ++j) Isa::store_ints(out + (t * W + j) * kTile, x[j]);
  }
}

// Vector v of the block, or the first where the matrix ends before: its result is not stored.
inline int64_t column_of(const Product& p, int64_t block, int v) {
  int64_t n = block * kColumns + v * L;
  return n < p.w.n ? n : block * kColumns;
}

template <int W>
Block prepared_block(const Product& p, int64_t block, uint8_t* scratch) {
  Block b{{}, p.w.scales, p.w.offsets, p.w.scale_dtype, p.w.offset_dtype, {}};
  int64_t tile_words = words(p.act.k) * W * kTile;
  auto* planes = reinterpret_cast<uint32_t*>(scratch);
  for (int v = 0; v < NV; ++v) {
    int64_t n = column_of(p, block, v), tile = n / kTile, lane = n % kTile;
    b.words[v] = p.w.planes + tile * tile_words + lane;
    b.scale_at[v] = tile * p.w.groups * kTile + lane;
    if (W > 1 && p.method == Method::kPlanes) {
      uint32_t* out = planes + v * L;
      fields_to_planes<W>(b.words[v], words(p.act.k), out);
      b.words[v] = out;
    }
  }
  return b;
}

template <int W>
Block gathered_block(const Product& p, int64_t block, uint8_t* scratch) {
  int64_t tile_words = words(p.act.k) * W * kTile;
  auto* fields = reinterpret_cast<uint32_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(fields + tile_words);
  float* offsets = scales + p.w.groups * kTile;
  Block b{{}, scales, p.w.offsets == nullptr ? nullptr : offsets, DType::kF32, DType::kF32, {}};
  for (int v = 0; v < NV; ++v) {
    int64_t n = column_of(p, block, v);
    int rows = static_cast<int>(min64(L, p.w.n - n));
    b.words[v] = fields + v * L;
    b.scale_at[v] = v * L;
    gather_columns<W>(p, n, rows, p.method != Method::kPlanes, fields + v * L);
    // An integer product has no scales.
    if (p.w.scales != nullptr) {
      gather_groups(p, p.w.scales, p.w.scale_dtype, n, rows, scales + b.scale_at[v]);
    }
    if (p.w.offsets != nullptr) {
      gather_groups(p, p.w.offsets, p.w.offset_dtype, n, rows, offsets + b.scale_at[v]);
    }
  }
  return b;
}

template <int W>
inline Block make_block(const Product& p, int64_t block, uint8_t* scratch) {
  return p.w.prepared ? prepared_block<W>(p, block, scratch)
                      : gathered_block<W>(p, block, scratch);
}

}  // namespace
}  // namespace anyprec::cpu

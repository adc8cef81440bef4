// Activations of one row: rotate, scale, round, sum, and lay out as the product reads them.

namespace anyprec::cpu {
namespace {

// Row m as float32, zero up to whole words.
inline void load_row(const Activations& a, int64_t m, float* row) {
  with_dtype(a.dtype, a.x, [&](auto* x) {
    x += m * a.k;
    int64_t i = 0;
    for (; i + 8 <= a.k; i += 8) widen8(x + i, row + i);
    for (; i < a.k; ++i) row[i] = to_float(x[i]);
  });
  for (int64_t i = a.k; i < words(a.k) * kWordBits; ++i) row[i] = 0;
}

inline void flip_signs(float* x, int64_t k, const uint32_t* signs) {
  for (int64_t w = 0; w < words(k); ++w) {
    for (int i = 0; i < kWordBits; ++i) {
      float& v = x[w * kWordBits + i];
      v = float_of(bits_of(v) ^ ((signs[w] >> i) << 31));
    }
  }
}

// One round inside vectors: lane i becomes x[i] + x[i + H], lane i + H becomes x[i] - x[i + H].
template <int H>
inline F sums_and_differences(F x) {
  return Isa::fadd(Isa::swap_lanes<H>(x), Isa::negate_upper<H>(x));
}

// Sums and differences at distance 1, 2, 4, ... and one product: the order is part of the format.
inline void hadamard(float* x, int64_t n, int64_t block) {
  for (int64_t i = 0; i < n; i += L) {
    F v = Isa::load(x + i);
    v = sums_and_differences<1>(v);
    v = sums_and_differences<2>(v);
    if constexpr (L > 4) v = sums_and_differences<4>(v);
    if constexpr (L > 8) v = sums_and_differences<8>(v);
    Isa::store(x + i, v);
  }
  for (int64_t h = L; h < block; h *= 2) {
    for (int64_t i = 0; i < n; i += 2 * h) {
      for (int64_t j = i; j < i + h; j += L) {
        F a = Isa::load(x + j), b = Isa::load(x + j + h);
        Isa::store(x + j, Isa::fadd(a, b));
        Isa::store(x + j + h, Isa::fsub(a, b));
      }
    }
  }
  float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < n; ++i) x[i] *= norm;
}

inline void load_rotated_row(const Activations& a, int64_t m, float* row) {
  load_row(a, m, row);
  if (a.block == 0) return;
  flip_signs(row, a.k, a.signs);
  hadamard(row, a.k, a.block);
}

// As unsigned integers, magnitudes keep their order, and infinity and NaN come out largest.
inline float largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u = bits_of(x[i]) & 0x7fffffffu;
    largest = u > largest ? u : largest;
  }
  return float_of(largest);
}

// absmax / act_max_level; 0 if too small, NaN if too large or not finite.
inline float absmax_scale(float absmax, int bits) {
  float scale = absmax * static_cast<float>(1.0 / act_max_level(bits));
  if (!(scale <= kMaxScale)) return __builtin_nanf("");
  return scale >= kMinScale ? scale : 0.0f;
}

// See encode() and act_encode() in jax_anyprec/format.py.
template <bool HasZero>
inline void encode(const float* x, int64_t n, float scale, int bits, uint8_t* codes) {
  float inverse = scale >= kMinScale && scale <= kMaxScale ? 0.5f / scale : 0.0f;
  int half = 1 << (bits - 1);
  float low = static_cast<float>(HasZero - half), high = static_cast<float>(half - 1);
  for (int64_t i = 0; i < n; ++i) {
    float level = x[i] * inverse;
    if (HasZero) {
      level = __builtin_rintf(level);
    } else {
      level = __builtin_fabsf(level) < kZeroLevel ? 0.0f : __builtin_floorf(level);
    }
    level = level >= low ? level : low;
    level = level <= high ? level : high;
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(level) + half);
  }
}

inline void quantize_row(const Activations& a, int64_t m, const float* row, uint8_t* codes,
                         float* scales) {
  if (a.k == 0) {
    scales[0] = 0;
    return;
  }
  for (int64_t begin = 0, g = 0; begin < a.k; begin += a.group_size, ++g) {
    float own = a.peaks == nullptr ? largest_magnitude(row + begin, a.group_size) : a.peaks[m];
    scales[g] = absmax_scale(own, a.bits);
    if (a.bits < kZeroBits) {
      encode<false>(row + begin, a.group_size, scales[g], a.bits, codes + begin);
    } else {
      encode<true>(row + begin, a.group_size, scales[g], a.bits, codes + begin);
    }
  }
}

// Codes uint8[words * 32] to signed bytes in place: integers over their unit, 0 past k.
inline void to_signed(uint8_t* codes, int64_t k, int bits) {
  int twice = act_unit(bits) == 1, centre = act_centre(bits) / act_unit(bits);
  for (int64_t i = 0; i < k; ++i) {
    codes[i] = static_cast<uint8_t>((codes[i] << twice) - centre);
  }
  for (int64_t i = k; i < words(k) * kWordBits; ++i) codes[i] = 0;
}

// The sums of a part from its integers int8[words * 32], 0 past k.
inline void store_sums(const Product& p, int64_t part, const int8_t* values, int unit) {
  int32_t* sums = in_part<int32_t>(p, part, p.row.sums);
  for (int64_t s = 0; s < p.segment_count; ++s) {
    const Segment& seg = p.segments[s];
    const int8_t* c = values + int64_t{seg.word} * kWordBits;
    int32_t sum = 0;
    for (int i = 0; i < seg.words * kWordBits; ++i) sum += c[i];
    sums[s] = sum * unit;
  }
}

// Payload and sums of a part from its integers, for products by codes.
inline void store_bytes(const Product& p, int64_t part, const uint8_t* values) {
  store_sums(p, part, reinterpret_cast<const int8_t*>(values), 1);
  uint8_t* out = in_part<uint8_t>(p, part, 0);
  for (int64_t w = 0; w < words(p.act.k); ++w) {
    Isa::transpose_8x4(values + w * kWordBits, out + w * kWordBits);
  }
}

// Payload and sums of row m from codes uint8[words * 32], which are used up.
inline void store_codes(const Product& p, int64_t m, uint8_t* codes) {
  const Activations& a = p.act;
  if (p.method == Method::kCodes) {
    to_signed(codes, a.k, a.bits);
    return store_bytes(p, m, codes);
  }
  int64_t nwords = words(a.k);
  uint32_t* planes = in_part<uint32_t>(p, m, 0);
  for (int64_t i = a.k; i < nwords * kWordBits; ++i) codes[i] = 0;
  for (int i = 0; i < a.bits; ++i) {
    for (int64_t w = 0; w < nwords; ++w) {
      planes[i * nwords + w] = Isa::pack_word(codes + w * kWordBits, i);
    }
  }
  to_signed(codes, a.k, a.bits);
  store_sums(p, m, reinterpret_cast<const int8_t*>(codes), act_unit(a.bits));
}

// Digits int8[kFloatDigits][stride] of the integers nearest to x * (kFloatLevel / absmax).
inline void to_digits(const float* x, int64_t n, float inverse, uint8_t* digits, int64_t stride) {
  constexpr float kLevel = kFloatLevel;
  for (int64_t i = 0; i < n; ++i) {
    float level = __builtin_rintf(x[i] * inverse);
    level = level >= -kLevel ? level : -kLevel;  // also where it is NaN
    level = level <= kLevel ? level : kLevel;
    int32_t c = static_cast<int32_t>(level), high = (c + 128) >> 8;
    digits[i] = static_cast<uint8_t>(c);
    digits[stride + i] = static_cast<uint8_t>(high);
    digits[2 * stride + i] = static_cast<uint8_t>((high + 128) >> 8);
  }
}

// Float activations as integers of 24 bits: a group's scale is its largest magnitude over
// kFloatLevel, NaN if that is not finite, 0 (and so are the values) if it is below kMinScale.
inline void digits_of_row(const Product& p, int64_t m, const float* row, uint8_t* digits) {
  const Activations& a = p.act;
  int64_t stride = words(a.k) * kWordBits;
  float* scales = in_part<float>(p, m * kFloatDigits, p.row.scales);
  scales[0] = 0;
  for (int64_t begin = 0, g = 0; begin < a.k; begin += a.group_size, ++g) {
    float absmax = largest_magnitude(row + begin, a.group_size);
    bool usable = absmax >= kMinScale && absmax < __builtin_inff();
    float inverse = usable ? kFloatLevel / absmax : 0.0f;
    scales[g] = usable ? absmax / kFloatLevel : absmax < kMinScale ? 0.0f : __builtin_nanf("");
    to_digits(row + begin, a.group_size, inverse, digits + begin, stride);
  }
  for (int d = 0; d < kFloatDigits; ++d) {
    uint8_t* values = digits + d * stride;
    for (int64_t i = a.k; i < stride; ++i) values[i] = 0;
    store_bytes(p, m * kFloatDigits + d, values);
  }
}

void prologue(const Product& p, int64_t m, uint8_t* scratch) {
  const Activations& a = p.act;
  float* row = reinterpret_cast<float*>(scratch);
  uint8_t* codes = scratch + words(a.k) * kWordBits * sizeof(float);
  load_rotated_row(a, m, row);
  if (p.method == Method::kFloat) return digits_of_row(p, m, row, codes);
  float* scales = in_part<float>(p, m, p.row.scales);
  quantize_row(a, m, row, codes, scales);
  if (p.method == Method::kCodes && act_unit(a.bits) != 1) {
    int64_t groups = a.k == 0 ? 1 : a.k / a.group_size;
    for (int64_t g = 0; g < groups; ++g) scales[g] *= static_cast<float>(act_unit(a.bits));
  }
  store_codes(p, m, codes);
}

void prologue_codes(const Product& p, int64_t m, uint8_t* codes) { store_codes(p, m, codes); }

void quantize(const Activations& a, int64_t m, uint8_t* scratch, uint8_t* codes, float* scales) {
  float* row = reinterpret_cast<float*>(scratch);
  load_rotated_row(a, m, row);
  quantize_row(a, m, row, codes, scales);
}

}  // namespace
}  // namespace anyprec::cpu

// The CPU kernels of each instruction set against naive definitions: no Python, no XLA, so that
// sanitizers see every access. Buffers have exactly the size that a caller must give.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/kernels.h"
#include "exact.h"

using namespace anyprec;
using namespace anyprec::cpu;

namespace {

#ifdef __aarch64__
using Half = __fp16;  // GCC has _Float16 there only in C
#else
using Half = _Float16;
#endif


int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

struct Shape {
  int64_t m, n, k, group;
};

int64_t groups_of(const Shape& s) { return s.k == 0 ? 1 : s.k / s.group; }

std::string name_of(const Kernels& kernels, const Shape& s, int act_bits, int bits, Method method,
                    bool prepared) {
  static const char* methods[] = {"float", "codes", "planes"};
  char text[128];
  std::snprintf(text, sizeof text, "%s %s m=%lld n=%lld k=%lld group=%lld a%d w%d%s", kernels.name,
                methods[static_cast<int>(method)], static_cast<long long>(s.m),
                static_cast<long long>(s.n), static_cast<long long>(s.k),
                static_cast<long long>(s.group), act_bits, bits, prepared ? " prepared" : "");
  return text;
}

// --- naive definitions ---

int odd(int code, int bits) { return 2 * code - ((1 << bits) - 1); }

// Activations of 4 bits and more are even.
int act_int(int code, int bits) { return odd(code, bits) - (bits >= 4); }

float naive_scale(const float* x, int64_t n, int bits) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(x[i])) return NAN;
    largest = std::max(largest, std::fabs(x[i]));
  }
  float scale = largest * static_cast<float>(1.0 / ((1 << bits) - 1 - (bits >= 4)));
  if (scale > kMaxScale) return NAN;
  return scale < kMinScale ? 0 : scale;
}

int naive_code(float x, float scale, int bits) {
  bool usable = scale >= kMinScale && scale <= kMaxScale;
  float level = x * (usable ? 0.5f / scale : 0.0f);
  int top = (1 << bits) - 1, half = 1 << (bits - 1);
  int low = bits >= 4;
  if (std::isnan(level)) return low;
  if (std::isinf(level)) return level < 0 ? low : top;
  double steps = std::fabs(level) < kZeroLevel ? 0 : std::floor(static_cast<double>(level));
  if (bits >= 4) steps = std::nearbyint(static_cast<double>(level));
  return static_cast<int>(std::min<double>(std::max<double>(steps + half, low), top));
}

// Signs, then a Hadamard transform by the definition in the order that the format fixes.
void naive_rotate(std::vector<float>& x, int64_t block, const uint32_t* signs) {
  for (size_t i = 0; i < x.size(); ++i) {
    if (signs[i / 32] >> (i % 32) & 1) x[i] = -x[i];
  }
  for (int64_t h = 1; h < block; h *= 2) {
    std::vector<float> next(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      next[i] = i & h ? x[i ^ h] - x[i] : x[i] + x[i ^ h];
    }
    x = next;
  }
  for (float& v : x) v *= static_cast<float>(1 / std::sqrt(static_cast<double>(block)));
}

void pack(const std::vector<int>& codes, int64_t n, int64_t k, int bits, Exact<uint32_t>& planes) {
  std::memset(planes.get(), 0, sizeof(uint32_t) * planes.size());
  for (int j = 0; j < bits; ++j) {
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        uint32_t bit = codes[r * k + i] >> (bits - 1 - j) & 1;
        planes[(j * n + r) * words(k) + i / 32] |= bit << (i % 32);
      }
    }
  }
}

// The fields of a prepared tensor, one code at a time, by the definition in format.h.
void pack_tiles(const std::vector<int>& codes, int64_t n, int64_t k, int bits,
                Exact<uint32_t>& tiles) {
  std::memset(tiles.get(), 0, sizeof(uint32_t) * tiles.size());
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      int code = codes[r * k + i], byte = i % 32 / 8, q = i % 8, word = 0;
      for (int c : {8, 4, 2, 1}) {
        if (!(bits & c)) continue;
        uint32_t part = code & ((1 << c) - 1);
        code >>= c;
        int64_t at = ((r / kTile * words(k) + i / 32) * bits + word + q % c) * kTile + r % kTile;
        tiles[at] |= part << (8 * byte + c * (q / c));
        word += c;
      }
    }
  }
}

// Values [n][groups] in tiles; columns past n hold what must not matter.
void tile_groups(const Exact<float>& values, int64_t n, int64_t groups, Exact<float>& tiled) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      tiled[(i / kTile * groups + g) * kTile + i % kTile] = values[i * groups + g];
    }
  }
}

// --- a problem with its buffers ---

struct Problem {
  Shape shape;
  std::vector<Segment> segments;
  Exact<uint32_t> planes, tiled;
  std::vector<int> codes;
  int bits;

  Problem(const Shape& s, int bits, std::mt19937& random)
      : shape(s), segments(segment_count(s.k, s.group)), planes(bits * s.n * words(s.k)),
        tiled(tiles(s.n) * words(s.k) * bits * kTile),
        codes(s.n * s.k), bits(bits) {
    make_segments(s.k, s.group, segments.data());
    for (int& c : codes) c = static_cast<int>(random() & ((1u << bits) - 1));
    for (int64_t i = 0; i < s.k && s.n > 0; ++i) codes[i] = (1 << bits) - 1;  // the largest sums
    pack(codes, s.n, s.k, bits, planes);
    pack_tiles(codes, s.n, s.k, bits, tiled);
  }

  Product product(Method method, int act_bits, int64_t act_group, bool prepared) const {
    Product p{};
    p.act.m = shape.m;
    p.act.k = shape.k;
    p.act.bits = act_bits;
    p.act.group_size = act_group;
    p.w.prepared = prepared;
    p.w.planes = prepared ? tiled.get() : planes.get();
    p.w.bits = bits;
    p.w.n = shape.n;
    p.w.groups = groups_of(shape);
    p.method = method;
    p.segments = segments.data();
    p.segment_count = static_cast<int64_t>(segments.size());
    int64_t act_groups = shape.k == 0 ? 1 : shape.k / act_group;
    p.row = row_layout(shape.k, p.segment_count, act_groups, act_bits, method);
    return p;
  }
};

// Calls run(block, m0, m1, scratch) as the XLA handlers do.
template <typename Run>
void for_blocks(const Kernels& kernels, const Product& p, Run&& run) {
  for (int64_t block = 0; block * kernels.columns < p.w.n; ++block) {
    for (int64_t m0 = 0; m0 < p.act.m; m0 += kMaxRows) {
      Exact<uint8_t> scratch(block_bytes(p));
      run(block, m0, std::min<int64_t>(p.act.m, m0 + kMaxRows), scratch.get());
    }
  }
}

// --- integer products ---

void test_integers(const Kernels& kernels, const Shape& s, int act_bits, int bits) {
  std::mt19937 random(static_cast<unsigned>(s.k * 64 + act_bits * 8 + bits));
  Problem problem(s, bits, random);
  int64_t groups = groups_of(s);
  std::vector<int> x(s.m * s.k);
  for (int& c : x) c = static_cast<int>(random() & ((1u << act_bits) - 1));
  for (int64_t i = 0; i < s.k && s.m > 0; ++i) x[i] = (1 << act_bits) - 1;

  std::vector<int64_t> expected(s.m * s.n * groups);
  for (int64_t m = 0; m < s.m; ++m) {
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t i = 0; i < s.k; ++i) {
        expected[(m * s.n + n) * groups + i / s.group] +=
            act_int(x[m * s.k + i], act_bits) * odd(problem.codes[n * s.k + i], bits);
      }
    }
  }
  for (bool prepared : {false, true}) {
    for (Method method : {Method::kCodes, Method::kPlanes}) {
      Product p = problem.product(method, act_bits, s.group, prepared);
      Exact<uint8_t> workspace(s.m * p.row.parts * p.row.bytes);
      Exact<int32_t> out(s.m * s.n * groups);
      std::memset(out.get(), 0, sizeof(int32_t) * out.size());  // the kernel adds
      p.workspace = workspace.get();
      p.out = out.get();
      for (int64_t m = 0; m < s.m; ++m) {
        Exact<uint8_t> padded(words(s.k) * kWordBits);
        for (int64_t i = 0; i < s.k; ++i) padded[i] = static_cast<uint8_t>(x[m * s.k + i]);
        kernels.prologue_codes(p, m, padded.get());
      }
      for_blocks(kernels, p, [&](int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
        kernels.int_product(p, block, m0, m1, scratch);
      });
      bool equal = std::equal(expected.begin(), expected.end(), out.get(),
                              [](int64_t a, int32_t b) { return a == b; });
      check(equal, "integers " + name_of(kernels, s, act_bits, bits, method, prepared));
    }
  }
}

// --- float products ---

// Relative error of `roundings` float32 roundings in a row.
double gamma(double roundings) { return roundings * 0x1p-24 / (1 - roundings * 0x1p-24); }

void test_product(const Kernels& kernels, const Shape& s, int act_bits, int bits, Method method,
                  bool offsets, bool token, int64_t block, bool prepared) {
  std::mt19937 random(static_cast<unsigned>(s.k * 64 + act_bits * 8 + bits));
  std::normal_distribution<float> normal;
  Problem problem(s, bits, random);
  int64_t groups = groups_of(s), act_group = token ? s.k : s.group;
  Product p = problem.product(method, act_bits, act_group, prepared);

  Exact<float> x(s.m * s.k), scales(s.n * groups), minima(s.n * groups), bias(s.n);
  Exact<float> tiled_scales(tiles(s.n) * groups * kTile), tiled_minima(tiled_scales.size());
  Exact<float> out(s.m * s.n);
  Exact<uint32_t> signs(words(s.k));
  for (int64_t i = 0; i < x.size(); ++i) x[i] = normal(random);
  for (int64_t i = 0; i < scales.size(); ++i) scales[i] = 0.01f + std::fabs(normal(random));
  for (int64_t i = 0; i < minima.size(); ++i) minima[i] = normal(random);
  for (int64_t i = 0; i < bias.size(); ++i) bias[i] = normal(random);
  tile_groups(scales, s.n, groups, tiled_scales);
  tile_groups(minima, s.n, groups, tiled_minima);
  for (int64_t i = 0; i < signs.size(); ++i) signs[i] = random();
  Exact<uint8_t> workspace(s.m * p.row.parts * p.row.bytes);
  p.act.x = x.get();
  p.act.dtype = p.out_dtype = p.bias_dtype = p.w.scale_dtype = p.w.offset_dtype = DType::kF32;
  p.act.block = block;
  p.act.signs = signs.get();
  // Largest magnitudes that are given, as if a row were one of several parts.
  bool peaked = token && offsets && act_bits != 0 && block == 0 && s.k > 0;
  Exact<float> peaks(s.m);
  for (int64_t m = 0; m < s.m; ++m) peaks[m] = 2.0f + static_cast<float>(m % 5);
  if (peaked) p.act.peaks = peaks.get();
  p.w.scales = prepared ? tiled_scales.get() : scales.get();
  p.w.offsets = !offsets ? nullptr : prepared ? tiled_minima.get() : minima.get();
  p.bias = bias.get();
  p.workspace = workspace.get();
  p.out = out.get();
  for (int64_t m = 0; m < s.m; ++m) {
    Exact<uint8_t> scratch(prologue_bytes(s.k));
    kernels.prologue(p, m, scratch.get());
  }
  for_blocks(kernels, p, [&](int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
    kernels.product(p, block, m0, m1, scratch);
  });

  // Roundings in the way of a term, as tests/oracle.py counts them.
  double count = (act_bits == 0 ? 14.0 : 8.0) + p.segment_count;
  bool ok = true;
  for (int64_t m = 0; m < s.m; ++m) {
    std::vector<float> row(x.get() + m * s.k, x.get() + (m + 1) * s.k);
    if (block != 0) naive_rotate(row, block, signs.get());
    std::vector<double> seen(row.begin(), row.end()), largest(s.k == 0 ? 0 : s.k / act_group);
    for (int64_t i = 0; i < s.k; ++i) {
      largest[i / act_group] = std::max(largest[i / act_group], std::fabs(seen[i]));
    }
    for (int64_t g = 0; act_bits != 0 && g < s.k; g += act_group) {
      float scale = peaked ? naive_scale(&peaks[m], 1, act_bits)
                           : naive_scale(row.data() + g, act_group, act_bits);
      for (int64_t i = g; i < g + act_group; ++i) {
        seen[i] = static_cast<double>(scale) * act_int(naive_code(row[i], scale, act_bits), act_bits);
      }
    }
    for (int64_t n = 0; n < s.n; ++n) {
      double y = bias[n], size = std::fabs(bias[n]), cut = 0;
      for (int64_t i = 0; i < s.k; ++i) {
        double scale = scales[n * groups + i / s.group], low = minima[n * groups + i / s.group];
        int code = problem.codes[n * s.k + i];
        y += seen[i] * (offsets ? 2 * scale * code + low : scale * odd(code, bits));
        double weight = 2 * scale * max_level(bits) + (offsets ? std::fabs(low) : 0);
        size += std::fabs(seen[i]) * weight;
        cut += largest[i / act_group] * weight;
      }
      // Float activations are cut to 24 bits of their group's largest.
      double error = gamma(count) * size + (act_bits == 0 ? 0x1p-24 * cut : 0);
      ok = ok && std::fabs(out[m * s.n + n] - y) <= error;
    }
  }
  check(ok, "product " + name_of(kernels, s, act_bits, bits, method, prepared) + (offsets ? " offsets" : "") +
                (token ? " token" : "") + (block ? " rotated" : ""));
}

// --- the prologue ---

void test_quantizer(const Kernels& kernels, int64_t k, int64_t group, int64_t block, int bits) {
  std::mt19937 random(static_cast<unsigned>(k + bits));
  std::normal_distribution<float> normal;
  const float edges[] = {0.0f, -0.0f, 0x1p-149f, 1e-40f, 1e-31f, 1e-20f, 1e20f, 1e30f, 3e38f,
                         INFINITY, -INFINITY, NAN, 0.5f, -1.0f};
  constexpr int64_t kEdges = std::size(edges);
  Exact<float> x(2 * kEdges * k);
  for (int64_t m = 0; m < 2 * kEdges; ++m) {
    for (int64_t i = 0; i < k; ++i) {
      x[m * k + i] = m < kEdges ? edges[m] : normal(random);
    }
    if (m >= kEdges) x[m * k + k - 1] = edges[m - kEdges];
  }
  Exact<uint32_t> signs(words(k));
  for (int64_t i = 0; i < signs.size(); ++i) signs[i] = random();
  Activations a{x.get(), DType::kF32, 2 * kEdges, k, bits, group, block, signs.get(), nullptr};
  bool ok = true;
  for (int64_t m = 0; m < a.m; ++m) {
    Exact<uint8_t> scratch(prologue_bytes(k));
    Exact<float> scales(k / group);
    Exact<uint8_t> codes(k);
    kernels.quantize(a, m, scratch.get(), codes.get(), scales.get());
    std::vector<float> row(x.get() + m * k, x.get() + (m + 1) * k);
    if (block != 0) naive_rotate(row, block, signs.get());
    for (int64_t g = 0; g < k / group; ++g) {
      float scale = naive_scale(row.data() + g * group, group, bits);
      ok = ok && (std::isnan(scale) ? std::isnan(scales[g]) : scales[g] == scale);
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        ok = ok && codes[i] == naive_code(row[i], scale, bits);
      }
    }
  }
  check(ok, std::string("quantizer ") + kernels.name + " k=" + std::to_string(k) + " group=" +
                std::to_string(group) + " block=" + std::to_string(block) + " bits=" +
                std::to_string(bits));
}

// Halves are written as the nearest, ties to even; NaN stays NaN.
void test_half_types(const Kernels& kernels) {
  const float values[] = {0.0f, 1.0f, -1.5f, 1.00390625f, 1.01171875f, 65504.0f, 65520.0f,
                          0x1p-24f, 0x1.8p-25f, 0x1p-26f, INFINITY, -INFINITY, NAN};
  Shape s{1, static_cast<int64_t>(std::size(values)), 1, 1};
  std::mt19937 random(1);
  Problem problem(s, 1, random);
  std::vector<float> ones(s.n, 1.0f);
  float zero = 0;
  for (DType dtype : {DType::kF16, DType::kBF16}) {
    Product p = problem.product(Method::kFloat, 0, 1, false);
    Exact<uint8_t> workspace(p.row.parts * p.row.bytes);
    Exact<uint16_t> out(s.n);
    p.act.x = &zero;
    p.act.dtype = p.w.scale_dtype = p.bias_dtype = DType::kF32;
    p.w.scales = ones.data();
    p.bias = values;  // and nothing else
    p.workspace = workspace.get();
    p.out = out.get();
    p.out_dtype = dtype;
    Exact<uint8_t> row(prologue_bytes(s.k));
    kernels.prologue(p, 0, row.get());
    for_blocks(kernels, p, [&](int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
      kernels.product(p, block, m0, m1, scratch);
    });
    bool ok = true;
    for (int64_t n = 0; n < s.n; ++n) {
      float y = values[n];
      uint16_t expected;
      if (dtype == DType::kF16) {
        Half half = static_cast<Half>(y);
        std::memcpy(&expected, &half, 2);
      } else {
        uint32_t bits;
        std::memcpy(&bits, &y, 4);
        uint32_t low = bits & 0xffff, high = bits >> 16;
        bool up = low > 0x8000 || (low == 0x8000 && (high & 1));
        expected = static_cast<uint16_t>(high + up);
      }
      uint16_t exponent = dtype == DType::kF16 ? 0x7c00 : 0x7f80;
      bool nan = (out[n] & 0x7fff) > exponent;
      ok = ok && (std::isnan(y) ? nan : out[n] == expected);
    }
    check(ok, std::string("half types ") + kernels.name + (dtype == DType::kF16 ? " f16" : " bf16"));
  }
}

const Shape kAllPairs[] = {{3, 17, 65, 65}, {5, 5, 96, 32}, {1, 33, 257, 257}};

const Shape kShapes[] = {
    {0, 5, 33, 33},   {5, 0, 33, 33},    {3, 4, 0, 0},      {1, 1, 1, 1},      {2, 3, 2, 2},
    {4, 16, 31, 31},  {8, 15, 32, 32},   {9, 17, 33, 33},   {15, 31, 63, 63},  {3, 32, 127, 127},
    {2, 33, 1000, 1000}, {129, 3, 64, 64}, {257, 1, 65, 65}, {1, 65, 288, 32}, {7, 2, 576, 64},
    {2, 8, 384, 128}, {3, 9, 640, 320},  {2, 7, 1056, 352}, {1, 2, 1024, 32},
};

void test_products(const Kernels& kernels, bool prepared) {
  auto test = [&](const Shape& s, int act_bits, int bits, Method method, bool offsets, bool token,
                  int64_t block = 0) {
    test_product(kernels, s, act_bits, bits, method, offsets, token, block, prepared);
  };
  for (int w = 1; w <= kMaxBits; ++w) {
    for (bool offsets : {false, true}) {
      for (int a = 1; a <= kMaxBits; ++a) {
        test({3, 17, 96, 32}, a, w, Method::kCodes, offsets, offsets);
        test({3, 17, 96, 32}, a, w, Method::kPlanes, offsets, !offsets);
      }
      test({3, 17, 96, 32}, 0, w, Method::kFloat, offsets, false);
    }
  }
  for (const Shape& s : kShapes) {
    for (int bits : {1, 3, 8}) {
      for (bool offsets : {false, true}) {
        test(s, bits, 4, Method::kCodes, offsets, false);
        test(s, bits, 3, Method::kPlanes, offsets, true);
        test(s, 0, bits, Method::kFloat, offsets, false);
      }
    }
  }
  for (int64_t block : {64, 128}) {
    for (int act_bits : {0, 4, 8}) {
      Method method = act_bits == 0 ? Method::kFloat : Method::kCodes;
      test({3, 9, 256, 64}, act_bits, 4, method, true, true, block);
    }
  }
  // Longer than int32 holds: segments keep each integer small.
  test({1, 2, 70000, 70000}, 8, 8, Method::kCodes, false, false);
  test({1, 2, 70000, 70000}, 8, 8, Method::kPlanes, true, false);
}

void test_kernels(const Kernels& kernels) {
  for (int a = 1; a <= kMaxBits; ++a) {
    for (int w = 1; w <= kMaxBits; ++w) {
      for (const Shape& s : kAllPairs) test_integers(kernels, s, a, w);
    }
  }
  for (const Shape& s : kShapes) {
    for (int bits : {1, 3, 8}) {
      test_integers(kernels, s, bits, 9 - bits);
      test_integers(kernels, s, bits, bits);
    }
  }
  for (bool prepared : {false, true}) test_products(kernels, prepared);
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    test_quantizer(kernels, 96, 32, 0, bits);
    test_quantizer(kernels, 33, 33, 0, bits);
    test_quantizer(kernels, 1, 1, 0, bits);
    test_quantizer(kernels, 192, 64, 64, bits);
    test_quantizer(kernels, 256, 256, 128, bits);
  }
  test_half_types(kernels);
}

}  // namespace

int main() {
  for (const Kernels* kernels : available_kernels()) test_kernels(*kernels);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

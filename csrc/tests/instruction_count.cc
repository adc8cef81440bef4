// Runs one kernel on a fixed case, for counting its instructions: `instruction_count ISA CASE`.
// Without arguments it lists the cases. benchmarks/instructions.py counts.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/kernels.h"
#include "exact.h"

using namespace anyprec;
using namespace anyprec::cpu;

namespace {

constexpr int64_t kK = 512, kN = 64;

struct Case {
  const char* name;
  bool prologue;  // of the activations; else the product
  int act_bits, bits;
  Method method;
  int64_t m, group, block;
};

constexpr Case kCases[] = {
    {"prologue A8", true, 8, 4, Method::kCodes, 1, kK, 0},
    {"prologue A8 groups of 64", true, 8, 4, Method::kCodes, 1, 64, 0},
    {"prologue A8 rotated", true, 8, 4, Method::kCodes, 1, kK, kK},
    {"prologue A1 planes", true, 1, 1, Method::kPlanes, 1, kK, 0},
    {"prologue A16", true, 0, 4, Method::kFloat, 1, kK, 0},
    {"W1A1 planes M1", false, 1, 1, Method::kPlanes, 1, kK, 0},
    {"W1A1 planes M16", false, 1, 1, Method::kPlanes, 16, kK, 0},
    {"W2A2 planes M16", false, 2, 2, Method::kPlanes, 16, kK, 0},
    {"W2A8 codes M1", false, 8, 2, Method::kCodes, 1, kK, 0},
    {"W4A8 codes M1", false, 8, 4, Method::kCodes, 1, kK, 0},
    {"W4A8 codes M1 groups of 32", false, 8, 4, Method::kCodes, 1, 32, 0},
    {"W4A8 codes M16", false, 8, 4, Method::kCodes, 16, kK, 0},
    {"W4A8 codes M16 groups of 64", false, 8, 4, Method::kCodes, 16, 64, 0},
    {"W7A8 codes M16", false, 8, 7, Method::kCodes, 16, kK, 0},
    {"W8A8 codes M1", false, 8, 8, Method::kCodes, 1, kK, 0},
    {"W8A8 codes M16", false, 8, 8, Method::kCodes, 16, kK, 0},
    {"W4A16 float M1", false, 0, 4, Method::kFloat, 1, kK, 0},
    {"W4A16 float M16", false, 0, 4, Method::kFloat, 16, kK, 0},
};

}  // namespace

// All that is counted.
extern "C" __attribute__((noinline)) void measured(const Kernels& kernels, const Product& p,
                                                   bool prologue, uint8_t* scratch) {
  if (prologue) {
    for (int64_t m = 0; m < p.act.m; ++m) kernels.prologue(p, m, scratch);
  } else {
    for (int64_t b = 0; b * kernels.columns < p.w.n; ++b) {
      kernels.product(p, b, 0, p.act.m, scratch);
    }
  }
}

namespace {

void run(const Kernels& kernels, const Case& c) {
  std::mt19937 random(0);
  int64_t groups = kK / c.group;
  Exact<float> x(c.m * kK), scales(kN * groups), out(c.m * kN);
  Exact<uint32_t> planes(tiles(kN) * words(kK) * c.bits * kTile), signs(words(kK));
  for (int64_t i = 0; i < c.m * kK; ++i) x[i] = static_cast<float>(random() % 2001) - 1000;
  for (int64_t i = 0; i < scales.size(); ++i) scales[i] = 1;
  for (int64_t i = 0; i < planes.size(); ++i) planes[i] = random();
  for (int64_t i = 0; i < signs.size(); ++i) signs[i] = random();

  std::vector<Segment> segments(segment_count(kK, c.group));
  make_segments(kK, c.group, segments.data());
  Product p{};
  p.act = {x.get(), DType::kF32, c.m, kK, c.act_bits, c.group, c.block, signs.get()};
  p.w = {true, planes.get(), c.bits, kN, scales.get(), nullptr, DType::kF32, DType::kF32, groups};
  p.method = c.method;
  p.segments = segments.data();
  p.segment_count = static_cast<int64_t>(segments.size());
  p.row = row_layout(kK, p.segment_count, groups, c.act_bits, c.method);
  Exact<uint8_t> workspace(c.m * p.row.parts * p.row.bytes);
  p.workspace = workspace.get();
  p.out = out.get();
  p.out_dtype = DType::kF32;
  Exact<uint8_t> scratch(prologue_bytes(kK) + block_bytes(p));
  measured(kernels, p, c.prologue, scratch.get());
}

}  // namespace

int main(int count, char** arguments) {
  for (const Case& c : kCases) {
    if (count < 3) {
      std::puts(c.name);
    } else if (std::strcmp(arguments[2], c.name) == 0) {
      run(choose_kernels(arguments[1]), c);
      return 0;
    }
  }
  return count < 3 ? 0 : 1;
}

// The kernels whose instructions rates.cu counts and times.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// mma.sync m16n8k256.and.popc is emulated from compute capability 10.0 on, s4 from 9.0 on.
#define HAS_BINARY_MMA(arch) ((arch) < 1000)
#define HAS_INT4_MMA(arch) ((arch) < 900)

constexpr int kWarp = 32;
constexpr int kAccumulators = 8;    // independent products of a warp, in registers
constexpr int kRowFragments = 2;    // operands A that they share
constexpr int kGroupColumns = 256;  // N of a wgmma
constexpr int kGroupRows = 64;      // M of a wgmma
constexpr int kRowBytes = 128;      // of a row in shared memory: four wgmmas along K
constexpr int kGroupSteps = 16;     // wgmmas between waits
constexpr int kChains = 8;          // independent values of a thread, for scalar instructions

enum class Type { kBit, kS8, kU8, kS4, kBf16, kF16 };

__host__ __device__ constexpr bool is_float(Type type) {
  return type == Type::kBf16 || type == Type::kF16;
}

// --- mma.sync: fragments of all types have the same shape in words ---

struct A {
  uint32_t word[4];
};
struct B {
  uint32_t word[2];
};
struct C {
  uint32_t word[4];  // int32 or float32
};

#define MMA(shape_and_types)                                                                   \
  asm volatile("mma.sync.aligned." shape_and_types                                             \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
               : "+r"(c.word[0]), "+r"(c.word[1]), "+r"(c.word[2]), "+r"(c.word[3])            \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]),               \
                 "r"(b.word[0]), "r"(b.word[1]))

#define MMA_FLOAT(shape_and_types)                                                             \
  do {                                                                                         \
    float d[4];                                                                                \
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(c.word[i]);                             \
    asm volatile("mma.sync.aligned." shape_and_types                                           \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]),             \
                   "r"(b.word[0]), "r"(b.word[1]));                                            \
    for (int i = 0; i < 4; ++i) c.word[i] = __float_as_uint(d[i]);                             \
  } while (false)

template <Type kA, Type kB>
__device__ void mma(C& c, const A& a, const B& b) {
  if constexpr (kA == Type::kBit) {
#if HAS_BINARY_MMA(__CUDA_ARCH__)
    MMA("m16n8k256.row.col.s32.b1.b1.s32.and.popc");
#endif
  } else if constexpr (kA == Type::kS4) {
#if HAS_INT4_MMA(__CUDA_ARCH__)
    MMA("m16n8k64.row.col.s32.s4.s4.s32");
#endif
  } else if constexpr (kA == Type::kU8) {
    MMA("m16n8k32.row.col.s32.u8.s8.s32");
  } else if constexpr (kA == Type::kS8) {
    MMA("m16n8k32.row.col.s32.s8.s8.s32");
  } else if constexpr (kA == Type::kBf16) {
    MMA_FLOAT("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    MMA_FLOAT("m16n8k16.row.col.f32.f16.f16.f32");
  }
}

__device__ void load_two(B& first, B& second, uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(first.word[0]), "=r"(first.word[1]), "=r"(second.word[0]),
                 "=r"(second.word[1])
               : "r"(address));
}

// The cycles that a block took from its first to its last instruction of interest.
struct Stopwatch {
  long long begin;
  __device__ void start() {
    __syncthreads();
    begin = clock64();
  }
  __device__ void stop(long long* cycles) {
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  }
};

// `a` holds kRowFragments fragments of a warp, `b` kAccumulators, word by word and lane by lane.
template <Type kA, Type kB, bool kFromShared>
__global__ void mma_kernel(const uint32_t* a, const uint4* b, int steps, uint32_t* sums,
                           long long* cycles) {
  __shared__ uint4 pairs[kAccumulators / 2 * kWarp];
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < kAccumulators / 2 * kWarp; i += blockDim.x) pairs[i] = b[i];
  A rows[kRowFragments];
  for (int i = 0; i < kRowFragments; ++i) {
    for (int j = 0; j < 4; ++j) rows[i].word[j] = a[(4 * i + j) * kWarp + lane];
  }
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(pairs + lane));
  B columns[kAccumulators];
  C c[kAccumulators] = {};
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 2) {
      load_two(columns[i], columns[i + 1], shared + i / 2 * kWarp * sizeof(uint4));
    }
  };
  Stopwatch watch;
  watch.start();
  load();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if constexpr (kFromShared) load();
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) mma<kA, kB>(c[i], rows[i % kRowFragments], columns[i]);
  }
  watch.stop(cycles);
  uint32_t sum = 0;
  float float_sum = 0;
  for (const C& part : c) {
    for (const uint32_t word : part.word) {
      sum += word;
      float_sum += __uint_as_float(word);
    }
  }
  sums[blockIdx.x * blockDim.x + threadIdx.x] = is_float(kA) ? __float_as_uint(float_sum) : sum;
}

// --- wgmma: 64 x 256, both operands in shared memory, rows of 128 bytes with 128-byte swizzle ---

#define R4(x, i) "+" x(d[i]), "+" x(d[i + 1]), "+" x(d[i + 2]), "+" x(d[i + 3])
#define R16(x, i) R4(x, i), R4(x, i + 4), R4(x, i + 8), R4(x, i + 12)
#define R64(x, i) R16(x, i), R16(x, i + 16), R16(x, i + 32), R16(x, i + 48)
#define WGMMA(shape_and_types, x, flags)                                                       \
  asm volatile("wgmma.mma_async.sync.aligned." shape_and_types                                 \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"       \
               " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30,"   \
               " %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45,"   \
               " %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60,"   \
               " %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75,"   \
               " %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90,"   \
               " %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104,"   \
               " %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116,"      \
               " %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},"           \
               " %128, %129, 1" flags ";"                                                      \
               : R64(x, 0), R64(x, 64)                                                         \
               : "l"(a), "l"(b))

template <Type kA, Type kB, typename Accumulator>
__device__ void wgmma(Accumulator (&d)[128], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kA == Type::kBit) {
    WGMMA("m64n256k256.s32.b1.b1.and.popc", "r", "");
  } else if constexpr (kA == Type::kU8) {
    WGMMA("m64n256k32.s32.u8.s8", "r", "");
  } else if constexpr (kA == Type::kS8) {
    WGMMA("m64n256k32.s32.s8.s8", "r", "");
  } else {
    WGMMA("m64n256k16.f32.bf16.bf16", "f", ", 1, 1, 0, 0");
  }
#endif
}

// A tile whose first byte is at a multiple of 1024: groups of 8 rows follow each other.
__device__ uint64_t describe(const void* tile) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  constexpr uint64_t kGroupStride = 8 * kRowBytes / 16, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroupStride << 32 | kSwizzle128 << 62;
}

// Each warpgroup multiplies the same A[64] by the same B[256], `kGroupSteps` times in a step.
template <Type kA, Type kB>
__global__ void __launch_bounds__(256, 1)
    wgmma_kernel(const uint32_t* a, const uint32_t* b, int steps, uint32_t* sums,
                 long long* cycles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint32_t tiles[];
  constexpr int kWordsA = kGroupRows * kRowBytes / 4, kWordsB = kGroupColumns * kRowBytes / 4;
  for (int i = threadIdx.x; i < kWordsA; i += blockDim.x) tiles[i] = a[i];
  for (int i = threadIdx.x; i < kWordsB; i += blockDim.x) tiles[kWordsA + i] = b[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const uint64_t rows = describe(tiles), columns = describe(tiles + kWordsA);
  using Accumulator = std::conditional_t<is_float(kA), float, uint32_t>;
  Accumulator d[128] = {};
  Stopwatch watch;
  watch.start();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) {
      constexpr int kAlongK = kRowBytes / 32;
      wgmma<kA, kB>(d, rows + i % kAlongK * 2, columns + i % kAlongK * 2);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  watch.stop(cycles);
  Accumulator sum = 0;
  for (const Accumulator value : d) sum += value;
  uint32_t word;
  memcpy(&word, &sum, sizeof word);
  sums[blockIdx.x * blockDim.x + threadIdx.x] = word;
#endif
}

// --- instructions of one thread ---

enum class Scalar { kFfma, kImad, kLop3, kPopc, kPrmt, kI2f };

template <Scalar kScalar>
__device__ void apply(uint32_t& x, uint32_t a, uint32_t b) {
  if constexpr (kScalar == Scalar::kFfma) {
    float f = __uint_as_float(x);
    asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(f) : "f"(0.5f), "f"(__uint_as_float(b)));
    x = __float_as_uint(f);
  } else if constexpr (kScalar == Scalar::kImad) {
    asm volatile("mad.lo.u32 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
  } else if constexpr (kScalar == Scalar::kLop3) {
    asm volatile("lop3.b32 %0, %0, %1, %2, 0x6a;" : "+r"(x) : "r"(a), "r"(b));
  } else if constexpr (kScalar == Scalar::kPopc) {
    asm volatile("popc.b32 %0, %0;" : "+r"(x));
  } else if constexpr (kScalar == Scalar::kPrmt) {
    asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
  } else {
    float f;
    asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(f) : "r"(x));
    x = __float_as_uint(f);
  }
}

template <Scalar kScalar>
__global__ void scalar_kernel(const uint32_t* a, int steps, uint32_t* sums, long long* cycles) {
  uint32_t x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = a[i * kWarp + threadIdx.x % kWarp];
  const uint32_t first = x[0], second = x[1];
  Stopwatch watch;
  watch.start();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int repeat = 0; repeat < 4; ++repeat) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) apply<kScalar>(x[i], first, second);
    }
  }
  watch.stop(cycles);
  uint32_t sum = 0;
  for (const uint32_t value : x) sum += value;
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// --- memory ---

// All blocks together read `count` vectors `passes` times, past the first-level cache.
__global__ void read_kernel(const uint4* from, int64_t count, int passes, uint32_t* sums) {
  constexpr int kInFlight = 8;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
  for (int pass = 0; pass < passes; ++pass) {
    int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (; i + (kInFlight - 1) * threads < count; i += kInFlight * threads) {
      uint4 value[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) value[j] = __ldcg(from + i + j * threads);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        sum += value[j].x ^ value[j].y ^ value[j].z ^ value[j].w;
      }
    }
    for (; i < count; i += threads) sum += __ldcg(from + i).x;
  }
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

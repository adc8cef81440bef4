// Wrappers of the tensor-core instructions that the tests use.
#pragma once

#include <cstdint>

#define MMA(name, instruction)                                                             \
  __device__ inline void name(uint32_t (&c)[4], const uint32_t (&a)[4],                    \
                              const uint32_t (&b)[2]) {                                    \
    asm volatile(instruction                                                               \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));      \
  }

MMA(mma_b1, "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc")
MMA(mma_s8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")

#undef MMA

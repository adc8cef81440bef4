// The kernels with AVX2, FMA and F16C; null where the compiler targets no x86-64.
#include "kernels.h"

#ifdef __AVX2__
#include "vector8.h"

namespace anyprec::cpu {
namespace {

struct Isa : Vector8 {
  static constexpr const char* kName = "avx2";
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

#else
namespace anyprec::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace anyprec::cpu
#endif

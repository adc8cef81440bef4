// The kernels with AVX-VNNI (Alder Lake, Zen 5 and newer, of which some have no AVX-512); null where
// the compiler does not know it.
#include "kernels.h"

#ifdef __AVXVNNI__
#include "vector8.h"

namespace anyprec::cpu {
namespace {

struct Isa : Vector8 {
  static constexpr const char* kName = "avxvnni";
  static constexpr bool kScaledFields = true;

  template <int W>
  static V dot4(V acc, V w, V x) {
    return _mm256_dpbusd_avx_epi32(acc, w, x);
  }
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* avxvnni_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

#else
namespace anyprec::cpu {
const Kernels* avxvnni_kernels() { return nullptr; }
}  // namespace anyprec::cpu
#endif

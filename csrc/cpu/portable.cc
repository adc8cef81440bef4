// The kernels in portable C++.
#include "vector4.h"

namespace anyprec::cpu {
namespace {

struct Isa : Vector4 {
  static constexpr const char* kName = "portable";
};

}  // namespace
}  // namespace anyprec::cpu

#include "kernels.inl"

namespace anyprec::cpu {
const Kernels* portable_kernels() { return &kKernels; }
}  // namespace anyprec::cpu

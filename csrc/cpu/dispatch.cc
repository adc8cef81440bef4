// Instruction sets that this machine has: by CPUID and XGETBV (through the compiler's run-time
// support), or as Linux tells.
#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <stdexcept>

namespace anyprec::cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

bool has_avxvnni() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avxvnni");
#else
  return false;
#endif
}

bool has_dotprod() {
#if defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  return true;  // every Mac with such a processor
#else
  return false;
#endif
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
  if (has_avx512() && avx512_kernels() != nullptr) found.push_back(avx512_kernels());
  if (has_avxvnni() && avxvnni_kernels() != nullptr) found.push_back(avxvnni_kernels());
  if (has_avx2() && avx2_kernels() != nullptr) found.push_back(avx2_kernels());
  if (has_dotprod() && neon_kernels() != nullptr) found.push_back(neon_kernels());
  found.push_back(portable_kernels());
  return found;
}

const Kernels& choose_kernels(const char* name) {
  std::vector<const Kernels*> found = available_kernels();
  if (name == nullptr || *name == '\0') return *found.front();
  std::string names;
  for (const Kernels* k : found) {
    if (std::string(k->name) == name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("JAX_ANYPREC_ISA is '" + std::string(name) +
                           "', but this machine has: " + names);
}

}  // namespace anyprec::cpu

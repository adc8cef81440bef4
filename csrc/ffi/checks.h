// What the handlers of all backends check buffers and attributes with, and how they answer XLA.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../format.h"
#include "xla/ffi/api/ffi.h"

namespace anyprec {

namespace ffi = xla::ffi;

// A buffer or an attribute that an operation can't be computed with.
struct Bad {
  std::string message;
};

inline void require(bool ok, const char* what) {
  if (!ok) throw Bad{std::string("jax_anyprec: ") + what};
}

// Runs an operation; what it throws becomes its error.
template <typename F>
ffi::Error guarded(F&& run) {
  try {
    run();
    return ffi::Error::Success();
  } catch (const Bad& bad) {
    return ffi::Error::InvalidArgument(bad.message);
  } catch (const std::invalid_argument& e) {
    return ffi::Error::InvalidArgument(std::string("jax_anyprec: ") + e.what());
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_anyprec: ") + e.what());
  }
}

inline bool has_shape(const ffi::AnyBuffer& b, std::initializer_list<int64_t> dims) {
  auto have = b.dimensions();
  return have.size() == dims.size() && std::equal(have.begin(), have.end(), dims.begin());
}

// The name that a backend's enumeration has for a type of floats.
template <typename DType>
DType float_type(ffi::DataType t) {
  switch (t) {
    case ffi::DataType::F32: return DType::kF32;
    case ffi::DataType::F16: return DType::kF16;
    case ffi::DataType::BF16: return DType::kBF16;
    default: throw Bad{"jax_anyprec: expected float32, float16 or bfloat16"};
  }
}

inline int64_t group_count(int64_t k, int64_t group_size) {
  require(k == 0 || (group_size > 0 && k % group_size == 0), "group size must divide k");
  return k == 0 ? 1 : k / group_size;
}

// Signs and block of a rotation of k values, or no signs and block 0.
inline const uint32_t* read_rotation(const ffi::AnyBuffer& signs, int64_t block, int64_t k) {
  require(block == 0 || (block > 0 && (block & (block - 1)) == 0 && k % block == 0),
          "rotation block must be a power of two that divides k");
  require(signs.element_type() == ffi::DataType::U32 && has_shape(signs, {block ? words(k) : 0}),
          "rotation signs must be uint32[words]");
  return static_cast<const uint32_t*>(signs.untyped_data());
}

}  // namespace anyprec

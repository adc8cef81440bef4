// Buffers for tests of kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

// A block of its own on the heap, so that one byte too far is seen; 64 bytes aligned as XLA's are.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t count)
      : data_(static_cast<T*>(::operator new[](sizeof(T) * count, std::align_val_t{64}))),
        count_(count) {
    std::memset(static_cast<void*>(data_), 0xa5, sizeof(T) * count);  // no accidental zeros
  }
  ~Exact() { ::operator delete[](data_, std::align_val_t{64}); }
  Exact(const Exact&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  T* data_;
  int64_t count_;
};

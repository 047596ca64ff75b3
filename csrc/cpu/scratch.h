// Memory of a thread that works on one group after the other.
#pragma once
#include <cstdint>
#include <memory>

namespace r2 {
inline namespace R2_ISA {

// Memory that is kept from group to group; what is in it does not last.
template <class T>
class Scratch {
 public:
  T* get(int64_t n) {
    if (size_ < n) size_ = n + n / 4, held_.reset(new T[size_]);
    return held_.get();
  }
  const T* data() const { return held_.get(); }

 private:
  std::unique_ptr<T[]> held_;
  int64_t size_ = 0;
};

}  // namespace R2_ISA
}  // namespace r2

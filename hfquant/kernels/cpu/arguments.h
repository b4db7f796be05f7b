// Tensors as the kernels want them: packed weights, rows of activations of any layout, memory for one call.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "torch_abi.h"

namespace hfquant {
namespace {

const Kernels* kernels = &hfquant_scalar;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory for one call, aligned to a cache line.
template <class T>
Buffer<T> buffer(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
  T* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (!memory) throw std::bad_alloc();
  return Buffer<T>(memory);
}

// Pieces of memory for one call: from the stack while it lasts, because the heap costs more than a small layer.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    if (used_ + bytes <= STACK) {
      T* piece = reinterpret_cast<T*>(stack_ + used_);
      used_ += bytes;
      return piece;
    }
    heap_.push_back(buffer<char>(bytes));
    return reinterpret_cast<T*>(heap_.back().get());
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t STACK = 64;  // every piece on its own, so that the sanitizer sees where it ends
#else
  static constexpr int64_t STACK = 48 << 10;
#endif
  alignas(64) char stack_[STACK];
  int64_t used_ = 0;
  std::vector<Buffer<char>> heap_;
};

Float float_type(int32_t dtype) {
  if (dtype == torch.aoti_torch_dtype_float32()) return Float::f32;
  if (dtype == torch.aoti_torch_dtype_bfloat16()) return Float::bf16;
  require(dtype == torch.aoti_torch_dtype_float16(), "activations must be float32, bfloat16 or float16");
  return Float::f16;
}

int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

float bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

// The packed tensors of a weight; leading dimensions are rows too.
Weight weight_of(const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t bits, int64_t in_features) {
  require(codes.dtype() == torch.aoti_torch_dtype_int32() && scale.dtype() == torch.aoti_torch_dtype_int16(),
          "a packed weight is int32, its scales are int16");
  require(codes.contiguous() && scale.contiguous() && (!zero || zero.contiguous()), "packed tensors must be contiguous");
  Weight w{};
  const int64_t last = codes.dim() - 1, *sizes = codes.sizes();
  w.bits = int(bits);
  w.in_features = in_features;
  w.row_bytes = sizes[last] * 4;
  w.groups = scale.sizes()[scale.dim() - 1];
  w.rows = 1;
  for (int64_t i = 0; i < last; i++) w.rows *= sizes[i];
  require(w.row_bytes == (in_features * bits + 31) / 32 * 4, "the packed rows are of another length");
  require(scale.numel() == w.rows * w.groups && w.groups > 0 && in_features % w.groups == 0, "scales do not fit");
  w.codes = codes.data<uint8_t>();
  w.scale = scale.data<uint16_t>();
  if (zero) {
    w.zero = zero.data<uint8_t>();
    w.zero_bytes = zero.sizes()[zero.dim() - 1] * 4;
    require(w.zero_bytes == (w.groups * bits + 31) / 32 * 4, "zero points do not fit");
  }
  return w;
}

// The rows of a tensor [..., K] of any layout, as float32.
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : dims_(x.dim()), sizes_(x.sizes()), strides_(x.strides()), type_(float_type(x.dtype())), data_(x.data<char>()) {
    length = sizes_[dims_ - 1];
    for (int64_t i = 0; i + 1 < dims_; i++) count *= sizes_[i];
  }
  int64_t length, count = 1;
  Float type() const { return type_; }
  // Whether `read` needs no scratch.
  bool is_dense() const { return type_ == Float::f32 && (strides_[dims_ - 1] == 1 || length <= 1); }

  // Whether each row follows the one before it.
  bool contiguous() const {
    int64_t step = 1;
    for (int64_t i = dims_ - 1; i >= 0; step *= sizes_[i--])
      if (sizes_[i] != 1 && strides_[i] != step) return false;
    return true;
  }

  // Row `m` as it is; `dense` has room for a copy of one whose values are not neighbours.
  const char* raw(int64_t m, char* dense) const {
    const int64_t size = size_of(type_), step = strides_[dims_ - 1];
    int64_t offset = 0;
    for (int64_t i = dims_ - 2; i >= 0; i--) {
      offset += m % sizes_[i] * strides_[i];
      m /= sizes_[i];
    }
    const char* row = data_ + offset * size;
    if (step == 1 || length <= 1) return row;
    for (int64_t k = 0; k < length; k++) std::memcpy(dense + k * size, row + k * step * size, size);
    return dense;
  }

  // Row `m`; `scratch` has room for `length` floats and as many values of the type.
  const float* read(int64_t m, float* scratch) const {
    const char* row = raw(m, reinterpret_cast<char*>(scratch + length));
    if (type_ == Float::f32) return reinterpret_cast<const float*>(row);
    kernels->to_float(row, type_, length, scratch);
    return scratch;
  }

 private:
  int64_t dims_;
  const int64_t *sizes_, *strides_;
  Float type_;
  const char* data_;
};

}  // namespace
}  // namespace hfquant

// The part of LibTorch's stable C interface that the ops use (torch/csrc/stable/c/shim.h and torch/csrc/inductor/
// aoti_torch/c/shim.h, torch >= 2.10). Functions are looked up in the library that is loaded already: the extension
// compiles without torch, links no torch, and one build works with every torch that keeps the interface.
#pragma once
#include <dlfcn.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace hfquant {

using Handle = void*;           // a tensor
using StableIValue = uint64_t;  // an argument or result: a Handle, an integer, or a pointer to an optional one

#define HFQUANT_TORCH_FUNCTIONS(F)                                                              \
  F(int, aoti_torch_delete_tensor_object, (Handle))                                             \
  F(int, aoti_torch_new_tensor_handle, (Handle, Handle*))                                       \
  F(int, aoti_torch_get_data_ptr, (Handle, void**))                                             \
  F(int, aoti_torch_get_dim, (Handle, int64_t*))                                                \
  F(int, aoti_torch_get_sizes, (Handle, int64_t**))                                             \
  F(int, aoti_torch_get_strides, (Handle, int64_t**))                                           \
  F(int, aoti_torch_get_dtype, (Handle, int32_t*))                                              \
  F(int, aoti_torch_empty_strided,                                                              \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))              \
  F(int, aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, void**)) \
  F(int, torch_library_impl,                                                                    \
    (void*, const char*, void (*)(StableIValue*, uint64_t, uint64_t), uint64_t))                \
  F(int, torch_call_dispatcher, (const char*, const char*, StableIValue*, uint64_t))            \
  F(int, torch_parallel_for, (int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*)) \
  F(int, torch_get_num_threads, (uint32_t*))                                                    \
  F(int32_t, aoti_torch_dtype_float32, ())                                                      \
  F(int32_t, aoti_torch_dtype_bfloat16, ())                                                     \
  F(int32_t, aoti_torch_dtype_float16, ())                                                      \
  F(int32_t, aoti_torch_dtype_bool, ())                                                         \
  F(int32_t, aoti_torch_dtype_int8, ())                                                         \
  F(int32_t, aoti_torch_dtype_int16, ())                                                        \
  F(int32_t, aoti_torch_dtype_int32, ())                                                        \
  F(int32_t, aoti_torch_dtype_int64, ())                                                        \
  F(int32_t, aoti_torch_device_type_cpu, ())

struct TorchApi {
#define HFQUANT_DECLARE(RESULT, NAME, ARGUMENTS) RESULT(*NAME) ARGUMENTS = nullptr;
  HFQUANT_TORCH_FUNCTIONS(HFQUANT_DECLARE)
#undef HFQUANT_DECLARE
  int (*torch_delete_stable_ivalue)(StableIValue*) = nullptr;  // torch >= 2.13

  // Fills the table; returns the name of a function that torch lacks, or null.
  const char* load(void* library) {
#define HFQUANT_LOAD(RESULT, NAME, ARGUMENTS)                       \
  NAME = reinterpret_cast<decltype(NAME)>(dlsym(library, #NAME)); \
  if (!NAME) return #NAME;
    HFQUANT_TORCH_FUNCTIONS(HFQUANT_LOAD)
#undef HFQUANT_LOAD
    torch_delete_stable_ivalue =
        reinterpret_cast<decltype(torch_delete_stable_ivalue)>(dlsym(library, "torch_delete_stable_ivalue"));
    return nullptr;
  }
};

inline TorchApi torch;
constexpr uint64_t TARGET_TORCH = (2ull << 56) | (11ull << 48);  // semantics of torch 2.11

inline void check(int error, const char* what) {
  if (error) throw std::runtime_error(std::string("hfquant: torch failed in ") + what);
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("hfquant: ") + message);
}

// Asks for large pages, whole ones inside of new memory, where THP_MEM_ALLOC_ENABLE=1 would for all tensors of torch:
// glibc gives large tensors back to the system after each use, and new memory costs a page fault every 4 kB.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t start = (first + PAGE - 1) & ~(PAGE - 1), end = (first + bytes) & ~(PAGE - 1);
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // it may refuse
#endif
}

// Owns one reference to a tensor.
class Tensor {
 public:
  explicit Tensor(Handle handle = nullptr) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) torch.aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(int64_t dims, const int64_t* sizes, int32_t dtype) {
    require(dims <= 16, "more than 16 dimensions");
    int64_t strides[16], step = 1;
    for (int64_t i = dims - 1; i >= 0; i--) {
      strides[i] = step;
      step *= sizes[i] > 1 ? sizes[i] : 1;
    }
    return empty_strided(dims, sizes, strides, dtype);
  }
  static Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
    Handle out;
    check(torch.aoti_torch_empty_strided(dims, sizes, strides, dtype, torch.aoti_torch_device_type_cpu(), 0, &out),
          "empty");
    Tensor result(out);
    int64_t bytes = dtype == torch.aoti_torch_dtype_float32() ? 4 : dtype == torch.aoti_torch_dtype_int8() ? 1 : 2;
    for (int64_t i = 0; i < dims; i++) bytes *= sizes[i];
    if (bytes >= 1 << 22) ask_for_large_pages(result.data<void>(), bytes);
    return result;
  }
  // An argument of an op, whose reference passes to the callee.
  static Tensor argument(StableIValue value) { return Tensor(reinterpret_cast<Handle>(value)); }
  static Tensor optional(StableIValue value) {
    auto* inner = reinterpret_cast<StableIValue*>(value);
    if (!inner) return Tensor();
    Tensor out = argument(*inner);
    if (torch.torch_delete_stable_ivalue)
      torch.torch_delete_stable_ivalue(inner);
    else
      delete inner;
    return out;
  }

  explicit operator bool() const { return handle_ != nullptr; }
  StableIValue result() { return reinterpret_cast<StableIValue>(release()); }
  StableIValue share() const {
    Handle out;
    check(torch.aoti_torch_new_tensor_handle(handle_, &out), "new handle");
    return reinterpret_cast<StableIValue>(out);
  }
  Handle release() {
    Handle handle = handle_;
    handle_ = nullptr;
    return handle;
  }
  template <class T>
  T* data() const {
    void* out;
    check(torch.aoti_torch_get_data_ptr(handle_, &out), "data_ptr");
    return static_cast<T*>(out);
  }
  int64_t dim() const {
    int64_t out;
    check(torch.aoti_torch_get_dim(handle_, &out), "dim");
    return out;
  }
  const int64_t* sizes() const {
    int64_t* out;
    check(torch.aoti_torch_get_sizes(handle_, &out), "sizes");
    return out;
  }
  const int64_t* strides() const {
    int64_t* out;
    check(torch.aoti_torch_get_strides(handle_, &out), "strides");
    return out;
  }
  int32_t dtype() const {
    int32_t out;
    check(torch.aoti_torch_get_dtype(handle_, &out), "dtype");
    return out;
  }
  int64_t numel() const {
    const int64_t dims = dim(), *size = sizes();  // asked once: every answer is a call of torch
    int64_t out = 1;
    for (int64_t i = 0; i < dims; i++) out *= size[i];
    return out;
  }
  bool contiguous() const {
    const int64_t dims = dim(), *size = sizes(), *stride = strides();
    int64_t step = 1;
    bool fits = true;
    for (int64_t i = dims - 1; i >= 0; i--) {
      fits = fits && (size[i] <= 1 || stride[i] == step);
      step *= size[i];
    }
    return fits || step == 0;
  }

 private:
  Handle handle_;
};

// Runs `body(begin, end)` on torch's own threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) return body(int64_t(0), count);
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  check(torch.torch_parallel_for(0, count, grain < 1 ? 1 : grain, call, const_cast<Body*>(&body)), "parallel_for");
}

}  // namespace hfquant

// The CPU implementations of hfquant's ops: arguments are checked and divided among threads here, the arithmetic is in
// the table of the best instruction set (kernels.h).
#include <algorithm>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "attention_ops.h"
#include "linear_ops.h"

namespace hfquant {
namespace {

// dequantize_cpu(weight, weight_scale, weight_zero_point?, bits, in_features, dtype) -> Tensor
void dequantize(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor codes = Tensor::argument(stack[0]), scale = Tensor::argument(stack[1]);
  const Tensor zero = Tensor::optional(stack[2]);
  const int32_t dtype = int32_t(stack[5]);
  const Float type = float_type(dtype);
  const Weight w = weight_of(codes, scale, zero, int64_t(stack[3]), int64_t(stack[4]));
  int64_t sizes[16];
  require(codes.dim() <= 16, "more than 16 dimensions");
  std::copy(codes.sizes(), codes.sizes() + codes.dim(), sizes);
  sizes[codes.dim() - 1] = w.in_features;
  Tensor result = Tensor::empty(codes.dim(), sizes, dtype);
  char* out = result.data<char>();
  const int64_t row = w.in_features * size_of(type);
  parallel_for(w.rows, std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, row)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) kernels->dequantize_row(w, n, type, out + n * row);
  });
  stack[0] = result.result();
}

// quant_embedding_cpu(ids, weight, weight_scale, weight_zero_point?, bits, embedding_dim, dtype) -> Tensor
void embedding(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor ids = Tensor::argument(stack[0]), codes = Tensor::argument(stack[1]), scale = Tensor::argument(stack[2]);
  const Tensor zero = Tensor::optional(stack[3]);
  const int32_t dtype = int32_t(stack[6]);
  const Float type = float_type(dtype);
  const Weight w = weight_of(codes, scale, zero, int64_t(stack[4]), int64_t(stack[5]));
  require(ids.contiguous() && ids.dtype() == torch.aoti_torch_dtype_int64(), "ids must be contiguous int64");
  const int64_t count = ids.numel(), row = w.in_features * size_of(type);
  const int64_t* id = ids.data<int64_t>();
  for (int64_t i = 0; i < count; i++) require(id[i] >= 0 && id[i] < w.rows, "an id is not a row of the table");
  int64_t sizes[16];
  require(ids.dim() < 16, "more than 16 dimensions");
  std::copy(ids.sizes(), ids.sizes() + ids.dim(), sizes);
  sizes[ids.dim()] = w.in_features;
  Tensor result = Tensor::empty(ids.dim() + 1, sizes, dtype);
  char* out = result.data<char>();
  parallel_for(count, std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, row)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) kernels->dequantize_row(w, id[i], type, out + i * row);
  });
  stack[0] = result.result();
}

// quantize_rows_cpu(x, scale?, asymmetric) -> (Tensor, Tensor, Tensor)
void quantize_rows(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]), given = Tensor::optional(stack[1]);
  const bool asymmetric = stack[2] & 1;
  const Rows rows(x);
  int64_t sizes[16];
  require(x.dim() <= 16, "more than 16 dimensions");
  std::copy(x.sizes(), x.sizes() + x.dim(), sizes);
  Tensor codes = Tensor::empty(x.dim(), sizes, torch.aoti_torch_dtype_int8());
  sizes[x.dim() - 1] = 1;
  Tensor scale = Tensor::empty(x.dim(), sizes, torch.aoti_torch_dtype_float32());
  Tensor zeros = Tensor::empty(x.dim(), sizes, torch.aoti_torch_dtype_int8());
  const float* fixed = given ? given.data<float>() : nullptr;
  int8_t *code = codes.data<int8_t>(), *zero_points = zeros.data<int8_t>();
  float* steps = scale.data<float>();
  parallel_for(rows.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows.length)),
               [&](int64_t begin, int64_t end) {
                 auto scratch = buffer<float>(2 * rows.length);
                 for (int64_t m = begin; m < end; m++) {
                   float zero = 0;
                   kernels->quantize_row(rows.read(m, scratch.get()), rows.length, 1, rows.length, fixed,
                                         code + m * rows.length, rows.length, steps + m, asymmetric ? &zero : nullptr);
                   zero_points[m] = int8_t(zero);
                 }
               });
  stack[0] = codes.result();
  stack[1] = scale.result();
  stack[2] = zeros.result();
}

bool has(const char* name) {
#ifdef HFQUANT_X86
  const std::string isa(name);
  __builtin_cpu_init();  // asks the processor and whether the system saves the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avxvnni") return avx2 && __builtin_cpu_supports("avxvnni");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return std::strcmp(name, "scalar") == 0;
}

const Kernels* const TABLES[] = {
#ifdef HFQUANT_X86
    &kernels_avx512bf16(), &hfquant_avx512, &hfquant_avxvnni, &hfquant_avx2,
#endif
    &hfquant_scalar};

}  // namespace
}  // namespace hfquant

// Called once, by hfquant/kernels/native.py. Returns what is missing, or null.
extern "C" __attribute__((visibility("default"))) const char* hfquant_register(void* torch_library) {
  using namespace hfquant;
  if (const char* missing = torch.load(torch_library)) return missing;
  void* library = nullptr;
  if (torch.aoti_torch_library_init_impl("hfquant", "CPU", __FILE__, __LINE__, &library)) return "torch::Library";
  const std::pair<const char*, void (*)(StableIValue*, uint64_t, uint64_t)> ops[] = {
      {"int4_linear_cpu", linear<4>},
      {"int8_linear_cpu", linear<8>},
      {"dequantize_cpu", dequantize},
      {"quant_embedding_cpu", embedding},
      {"quantize_rows_cpu", quantize_rows},
      {"grid_weight_cpu", grid_weight},
      {"grid_weight_backward_cpu", grid_weight_backward},
      {"fake_quantize_cpu", fake_quantize},
      {"fake_quantize_backward_cpu", fake_quantize_backward},
      {"rms_norm_cpu", rms_norm},
      {"gated_product_cpu", gated_product},
      {"gated_mlp_cpu", gated_mlp},
      {"activated_linear_cpu", activated_linear},
      {"rotary_cpu", rotary},
      {"rotated_heads_cpu", rotated_heads},
      {"attention_cpu", attention},
  };
  for (const auto& [name, function] : ops)
    if (torch.torch_library_impl(library, name, function, TARGET_TORCH)) return name;
  return nullptr;  // the library lives as long as the process
}

// Name of the `index`-th instruction set of this build, the best one first; null behind the last.
extern "C" __attribute__((visibility("default"))) const char* hfquant_isa(int index) {
  const int count = sizeof(hfquant::TABLES) / sizeof(hfquant::TABLES[0]);
  return index < count ? hfquant::TABLES[index]->name : nullptr;
}

// Whether this machine can run the instruction set `name`.
extern "C" __attribute__((visibility("default"))) int hfquant_has(const char* name) { return hfquant::has(name); }

// Switches to the instruction set `name`, which the machine has; no op may be running.
extern "C" __attribute__((visibility("default"))) int hfquant_select(const char* name) {
  for (const auto* table : hfquant::TABLES)
    if (std::strcmp(table->name, name) == 0 && hfquant::has(name)) {
      hfquant::kernels = table;
      return 1;
    }
  return 0;
}

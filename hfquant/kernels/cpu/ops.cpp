// The CPU implementations of hfquant's ops: arguments are checked and divided among threads here, the arithmetic is in
// the table of the best instruction set (kernels.h).
#include <algorithm>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "attention_ops.h"
#include "between_ops.h"
#include "training_ops.h"

namespace hfquant {
namespace {

struct LinearCall {
  const Rows& x;
  const Weight& w;
  const float* given;  // static activation scale, or null
  int planes;
  bool asymmetric;  // rows have a code of zero
  int64_t padded() const { return round_up(w.in_features, 128); }
};

// What a row of ones has for sums; `natural [padded]` is overwritten.
int32_t* sums_of_ones(const Weight& w, int8_t* natural, int64_t padded, int64_t chunks, int64_t lanes, Scratch& scratch) {
  auto* codes = scratch.take<int8_t>(chunks * chunk_of(w, kernels->vector_bytes));
  auto* sums = scratch.take<int32_t>(chunks * lanes);
  int32_t row_sum = 0;
  std::memset(natural, 0, padded);
  std::memset(natural, 1, w.in_features);
  kernels->arrange_few(w, 1, natural, padded, codes, sums, &row_sum);
  return sums;
}

void few_rows(const LinearCall& call, const Output& out) {
  const Weight& w = call.w;
  const int64_t rows = call.x.count, chunk = chunk_of(w, kernels->vector_bytes);
  const int64_t chunks = (w.in_features + chunk - 1) / chunk, lanes = kernels->vector_bytes / 4;
  const int64_t steps = call.planes == 1 ? 1 : chunks, row_codes = call.planes * chunks * chunk;
  const int64_t row_lanes = parts_of(w.bits, call.planes) * chunks * lanes;
  Scratch scratch;
  auto* codes = scratch.take<int8_t>(rows * row_codes);
  auto* sums = scratch.take<int32_t>(rows * row_lanes);
  auto* row_sums = scratch.take<int32_t>(rows);
  auto* scale = scratch.take<float>(rows * steps);
  auto* zeros = scratch.take<int32_t>(rows);
  auto* natural = scratch.take<int8_t>(call.planes * call.padded());
  auto* dense = call.x.is_dense() ? nullptr : scratch.take<float>(2 * call.x.length);
  for (int64_t m = 0; m < rows; m++) {
    float zero = 0;
    kernels->quantize_row(call.x.read(m, dense), w.in_features, call.planes, chunk, call.given, natural, call.padded(),
                          scale + m * steps, call.asymmetric ? &zero : nullptr);
    zeros[m] = int32_t(zero);
    kernels->arrange_few(w, call.planes, natural, call.padded(), codes + m * row_codes, sums + m * row_lanes,
                         row_sums + m);
  }
  const bool ones = call.asymmetric && w.groups > 1;
  const Activations a{rows,     call.planes, codes, sums,
                      row_sums, scale,       call.asymmetric ? zeros : nullptr,
                      ones ? sums_of_ones(w, natural, call.padded(), chunks, lanes, scratch) : nullptr};
  const int64_t blocks = (w.rows + BLOCK - 1) / BLOCK;
  // Less than this many bytes of weights for a thread cost more to hand over than to multiply.
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / (w.row_bytes * BLOCK));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) { kernels->few_rows(w, a, out, begin, end); });
}

// Calls `work(block, first tile, last tile, panel)` for every block of the weight, on all threads.
template <class Work>
void each_panel(const Weight& w, int64_t tiles, int64_t bytes, const Work& work) {
  const int64_t blocks = (w.rows + BLOCK - 1) / BLOCK;
  uint32_t threads = 1;
  check(torch.torch_get_num_threads(&threads), "get_num_threads");
  // Narrow layers have too few blocks for many threads: divide the tiles too, at the price of packing panels again.
  const int64_t wanted = threads > 1 ? 4 * int64_t(threads) : 1;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted / blocks, tiles / 8)), step = (tiles + parts - 1) / parts;
  parallel_for(blocks * parts, 1, [&](int64_t begin, int64_t end) {
    auto panel = buffer<uint8_t>(bytes);
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % parts * step, last = std::min(first + step, tiles);
      if (first < last) work(i / parts, first, last, panel.get());
    }
  });
}

void many_rows(const LinearCall& call, const Output& out) {
  const Weight& w = call.w;
  const int64_t tile = kernels->tile, rows = call.x.count, tiles = (rows + tile - 1) / tile;
  const int64_t tile_codes = call.planes * panel_depth(w) * tile, segments = segments_of(w, call.planes);
  const int64_t tile_sums = call.planes * segments * tile, steps = call.planes == 1 ? 1 : segments;
  auto codes = buffer<int8_t>(tiles * tile_codes);
  auto sums = buffer<int32_t>(tiles * tile_sums);
  auto scale = buffer<float>(tiles * tile * steps);
  auto zeros = buffer<int32_t>(tiles * tile);
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    auto scratch = buffer<float>(2 * call.x.length);
    const int64_t row_codes = call.planes * call.padded();
    auto natural = buffer<int8_t>(tile * row_codes);
    for (int64_t t = begin; t < end; t++) {
      for (int64_t m = t * tile; m < (t + 1) * tile; m++) {
        int8_t* to = natural.get() + m % tile * row_codes;
        if (m < rows) {
          float zero = 0;
          const float* x = call.x.read(m, scratch.get());
          kernels->quantize_row(x, w.in_features, call.planes, segment_of(w, call.planes), call.given, to, call.padded(),
                                scale.get() + m * steps, call.asymmetric ? &zero : nullptr);
          zeros[m] = int32_t(zero);
        } else {
          std::memset(to, 0, row_codes);
          std::fill_n(scale.get() + m * steps, steps, 0.0f);
          zeros[m] = 0;
        }
      }
      kernels->arrange_tile(w, call.planes, natural.get(), call.padded(), codes.get() + t * tile_codes,
                            sums.get() + t * tile_sums);
    }
  });
  const Activations a{rows, call.planes, codes.get(), sums.get(), nullptr, scale.get(),
                      call.asymmetric ? zeros.get() : nullptr, nullptr};
  each_panel(w, tiles, panel_bytes(w), [&](int64_t block, int64_t first, int64_t last, uint8_t* panel) {
    kernels->pack_panel(w, block, panel);
    kernels->tiles(w, a, out, block, first, last, panel);
  });
}

// Many rows of bfloat16 where the processor multiplies them.
void many_bf16_rows(const LinearCall& call, const Output& out) {
  const Weight& w = call.w;
  const int64_t tile = kernels->tile, rows = call.x.count, tiles = (rows + tile - 1) / tile, pairs = panel_depth(w) / 2;
  auto values = buffer<uint16_t>(tiles * tile * pairs * 2);
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    auto padded = buffer<uint16_t>(pairs * 2), dense = buffer<uint16_t>(w.in_features);
    std::memset(padded.get(), 0, pairs * 4);
    for (int64_t m = begin * tile; m < end * tile; m++) {
      char* to = reinterpret_cast<char*>(values.get() + m / tile * tile * pairs * 2) + m % tile * 4;
      if (m < rows)
        std::memcpy(padded.get(), call.x.raw(m, reinterpret_cast<char*>(dense.get())), w.in_features * 2);
      else
        std::memset(padded.get(), 0, pairs * 4);
      for (int64_t i = 0; i < pairs; i++) std::memcpy(to + i * tile * 4, padded.get() + 2 * i, 4);
    }
  });
  const Bf16Rows x{rows, values.get()};
  each_panel(w, tiles, bf16_panel_bytes(w), [&](int64_t block, int64_t first, int64_t last, uint8_t* panel) {
    kernels->pack_bf16(w, block, panel);
    kernels->bf16_tiles(w, x, out, block, first, last, panel);
  });
}

// The bias as float32, rounded to the type of the activations first, as the reference does.
Buffer<float> read_bias(const Tensor& bias, Float type, int64_t count) {
  require(bias.numel() == count, "the bias does not fit");
  auto out = buffer<float>(2 * count);
  const Rows rows(bias);
  const float* values = rows.read(0, out.get());
  if (values != out.get()) std::memmove(out.get(), values, count * 4);
  if (rows.type() != type && type != Float::f32) {
    auto rounded = buffer<uint16_t>(count);
    kernels->from_float(out.get(), type, count, rounded.get());
    kernels->to_float(rounded.get(), type, count, out.get());
  }
  return out;
}

// The tensors of a linear layer: weight, weight_scale, weight_zero_point?, input_scale?, bias?.
struct Layer {
  explicit Layer(StableIValue* stack)
      : codes(Tensor::argument(stack[0])),
        scale(Tensor::argument(stack[1])),
        zero(Tensor::optional(stack[2])),
        given(Tensor::optional(stack[3])),
        bias(Tensor::optional(stack[4])) {}
  Tensor codes, scale, zero, given, bias;
};

Tensor apply(const Tensor& x, const Layer& layer, int bits, bool dynamic, bool asymmetric) {
  const Rows rows(x);
  const Weight w = weight_of(layer.codes, layer.scale, layer.zero, bits, rows.length);
  require(layer.codes.dim() == 2, "the weight of a linear layer has two dimensions");
  require(w.in_features > 0 && w.in_features <= 1 << 16 && (w.groups == 1 || w.in_features / w.groups % (32 / bits) == 0),
          "rows of this length or groups of this size are not for the native kernels");
  int64_t sizes[16];
  require(x.dim() <= 16, "more than 16 dimensions");
  std::copy(x.sizes(), x.sizes() + x.dim(), sizes);
  sizes[x.dim() - 1] = w.rows;
  Tensor result = Tensor::empty(x.dim(), sizes, x.dtype());
  const float input_scale = layer.given ? bfloat(*layer.given.data<uint16_t>()) : 0;
  const int planes = layer.given || dynamic ? 1 : rows.type() == Float::f32 ? 3 : 2;
  Buffer<float> bias_values;
  if (layer.bias) bias_values = read_bias(layer.bias, rows.type(), w.rows);
  if (rows.count && w.rows) {
    const Output out{result.data<void>(), rows.type(), bias_values.get(), w.rows};
    const LinearCall call{rows, w, layer.given ? &input_scale : nullptr, planes, dynamic && !layer.given && asymmetric};
    if (rows.count <= kernels->few)
      few_rows(call, out);
    else if (planes > 1 && rows.type() == Float::bf16 && kernels->bf16_tiles)
      many_bf16_rows(call, out);
    else
      many_rows(call, out);
  }
  return result;
}

// int4_linear_cpu, int8_linear_cpu(x, weight, weight_scale, weight_zero_point?, input_scale?, bias?, dynamic, asymmetric)
// -> Tensor
template <int BITS>
void linear(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]);
  const Layer layer(stack + 1);
  stack[0] = apply(x, layer, BITS, stack[6] & 1, stack[7] & 1).result();
}

// gated_mlp_cpu(x, gate and up and down: five tensors each, layouts, kind) -> Tensor; `layouts` has a byte for each layer:
// 1 for INT4, 2 for dynamic activations, 4 for asymmetric ones.
void gated_mlp(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]);
  const Layer gate(stack + 1), up(stack + 6), down(stack + 11);
  const auto step = [&](const Tensor& input, const Layer& layer, int index) {
    const int64_t layout = int64_t(stack[16]) >> 8 * index;
    return apply(input, layer, layout & 1 ? 4 : 8, layout & 2, layout & 4);
  };
  const Tensor left = step(x, gate, 0), right = step(x, up, 1);
  stack[0] = step(gated(left, right, Gate(int64_t(stack[17]))), down, 2).result();
}

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
#if defined(__x86_64__)
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
#if defined(__x86_64__)
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
      {"rotary_cpu", rotary},
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

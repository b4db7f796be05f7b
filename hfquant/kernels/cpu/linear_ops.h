// Linear layers, alone and together with what follows them. Included by ops.cpp.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "between_ops.h"

namespace hfquant {
namespace {

struct LinearCall {
  const Rows& x;
  Weight w;
  const float* given;  // static activation scale, or null
  int planes;
  bool asymmetric;  // rows have a code of zero
  bool bf16;        // activations are bfloat16, or may be rounded to it
  Output out;
  int64_t padded() const { return round_up(w.in_features, 128); }
  int64_t blocks() const { return (w.rows + BLOCK - 1) / BLOCK; }
  // The result from row `m` on.
  Output out_from(int64_t m) const {
    Output rest = out;
    rest.data = static_cast<char*>(out.data) + m * out.columns * size_of(out.type);
    return rest;
  }

  // Whether activations that are arranged for this layer are so for the `other`, which has the same ones.
  bool is_like(const LinearCall& other) const {
    return w.bits == other.w.bits && w.groups == other.w.groups && !w.zero == !other.w.zero && planes == other.planes &&
           w.in_features == other.w.in_features && bf16 == other.bf16 && asymmetric == other.asymmetric && !given == !other.given &&
           (!given || *given == *other.given);
  }
};

constexpr int64_t ROWS = 1008;  // that are multiplied at once, so that codes and results stay in the caches; whole tiles

using LinearCalls = std::vector<LinearCall>;  // of layers that share their activations; they are alike

// What a row of ones has for sums; `natural [padded]` is overwritten.
int32_t* sums_of_ones(const Weight& w, int8_t* natural, int64_t padded, int64_t chunks, int64_t lanes, Scratch& scratch) {
  auto* codes = scratch.take<int8_t>(chunks * chunk_of(w, 1, kernels->vector_bytes));
  auto* sums = scratch.take<int32_t>(chunks * lanes);
  int32_t row_sum = 0;
  std::memset(natural, 0, padded);
  std::memset(natural, 1, w.in_features);
  kernels->arrange_few(w, 1, natural, padded, codes, sums, &row_sum);
  return sums;
}

void few_rows(const LinearCalls& calls) {
  const LinearCall& call = calls[0];
  const Weight& w = call.w;
  const int64_t rows = call.x.count, chunk = chunk_of(w, call.planes, kernels->vector_bytes);
  const int64_t chunks = (w.in_features + chunk - 1) / chunk, lanes = kernels->vector_bytes / 4;
  const int64_t steps = call.planes == 1 ? 1 : chunks;
  // Rows a multiple of 4096 bytes apart would compete for the same lines of the first-level cache.
  int64_t row_codes = call.planes * chunks * chunk;
  if (row_codes >= 4096) row_codes = round_up(row_codes - 1536, 4096) + 1536;
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
  Activations a{rows,     call.planes, codes, row_codes, sums,
                row_sums, scale,       call.asymmetric ? zeros : nullptr,
                ones ? sums_of_ones(w, natural, call.padded(), chunks, lanes, scratch) : nullptr};
  a.folded = ones && rows == 1 && zeros[0] != -128;  // whose negative is no code
  for (int64_t i = 0; a.folded && i < row_lanes; i++) sums[i] -= zeros[0] * a.ones[i];
  int64_t blocks = 0;
  for (const LinearCall& each : calls) blocks += each.blocks();
  // Less than this many bytes of weights for a thread cost more to hand over than to multiply.
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / (w.row_bytes * BLOCK));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (const LinearCall& each : calls) {
      const int64_t first = std::max(begin, start), last = std::min(end, start + each.blocks());
      if (first < last) kernels->few_rows(each.w, a, each.out, first - start, last - start);
      start += each.blocks();
    }
  });
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

// Rows `start .. start + rows`.
void many_rows(const LinearCalls& calls, int64_t start, int64_t rows) {
  const LinearCall& call = calls[0];
  const Weight& w = call.w;
  const int64_t tile = kernels->tile, tiles = (rows + tile - 1) / tile;
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
          const float* x = call.x.read(start + m, scratch.get());
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
  const Activations a{rows, call.planes, codes.get(), 0, sums.get(), nullptr, scale.get(),
                      call.asymmetric ? zeros.get() : nullptr, nullptr};
  for (const LinearCall& each : calls)
    each_panel(each.w, tiles, panel_bytes(each.w), [&](int64_t block, int64_t first, int64_t last, uint8_t* panel) {
      kernels->pack_panel(each.w, block, panel);
      kernels->tiles(each.w, a, each.out_from(start), block, first, last, panel);
    });
}

// Many rows of bfloat16, or of float32 that is rounded to it, where the processor multiplies them.
void many_bf16_rows(const LinearCalls& calls, int64_t start, int64_t rows) {
  const LinearCall& call = calls[0];
  const Weight& w = call.w;
  const int64_t tile = kernels->tile, tiles = (rows + tile - 1) / tile, depth = panel_depth(w);
  auto values = buffer<uint16_t>(tiles * tile * depth);
  const bool ready = call.x.type() == Float::bf16 && call.x.contiguous() && depth == w.in_features;
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    auto natural = buffer<uint16_t>(tile * depth), dense = buffer<uint16_t>(2 * w.in_features);
    std::memset(natural.get(), 0, tile * depth * 2);
    for (int64_t t = begin; t < end; t++) {
      const bool whole = ready && (t + 1) * tile <= rows;
      for (int64_t m = t * tile; !whole && m < (t + 1) * tile; m++) {
        uint16_t* to = natural.get() + m % tile * depth;
        const char* row = m < rows ? call.x.raw(start + m, reinterpret_cast<char*>(dense.get())) : nullptr;
        if (!row)
          std::memset(to, 0, depth * 2);
        else if (call.x.type() == Float::bf16)
          std::memcpy(to, row, w.in_features * 2);
        else
          kernels->round_row_bf16(reinterpret_cast<const float*>(row), w.in_features, to);
      }
      const auto* there = whole ? reinterpret_cast<const uint16_t*>(call.x.raw(start + t * tile, nullptr)) : natural.get();
      kernels->arrange_bf16(there, depth, values.get() + t * tile * depth);
    }
  });
  const Bf16Rows x{rows, values.get()};
  for (const LinearCall& each : calls)
    each_panel(each.w, tiles, bf16_panel_bytes(each.w), [&](int64_t block, int64_t first, int64_t last, uint8_t* panel) {
      kernels->pack_bf16(each.w, block, panel);
      kernels->bf16_tiles(each.w, x, each.out_from(start), block, first, last, panel);
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
  Layer(StableIValue* stack, int bits, bool dynamic, bool asymmetric, int64_t precision)
      : codes(Tensor::argument(stack[0])),
        scale(Tensor::argument(stack[1])),
        zero(Tensor::optional(stack[2])),
        given(Tensor::optional(stack[3])),
        bias(Tensor::optional(stack[4])),
        bits(bits),
        dynamic(dynamic),
        asymmetric(asymmetric),
        precision(precision) {
    if (given) input_scale = bfloat(*given.data<uint16_t>());
  }
  // `layout` is 1 for INT4, 2 for dynamic activations, 4 for asymmetric ones, 8 for each step of precision, added up.
  Layer(StableIValue* stack, int64_t layout)
      : Layer(stack, layout & 1 ? 4 : 8, layout & 2, layout & 4, layout >> 3 & 3) {}
  Tensor codes, scale, zero, given, bias;
  const int bits;
  const bool dynamic, asymmetric;
  const int64_t precision;  // of float32 activations that are not quantized: 0 all, 1 at least 16 bits, 2 bfloat16
  float input_scale = 0;
  Buffer<float> bias_values;

  int64_t out_features() const { return codes.sizes()[0]; }

  // The call for activations `x`; results go to `out [M, N]`.
  LinearCall call(const Rows& x, void* out) {
    const Weight w = weight_of(codes, scale, zero, bits, x.length);
    require(codes.dim() == 2, "the weight of a linear layer has two dimensions");
    require(w.in_features > 0 && w.in_features <= 1 << 16 && (w.groups == 1 || w.in_features / w.groups % (32 / bits) == 0),
            "rows of this length or groups of this size are not for the native kernels");
    if (bias) bias_values = read_bias(bias, x.type(), w.rows);
    const bool is_float = !given && !dynamic, is_f32 = x.type() == Float::f32;
    const bool bf16 = is_float && (is_f32 ? precision == 2 : x.type() == Float::bf16);
    return {x, w, given ? &input_scale : nullptr, !is_float ? 1 : is_f32 && precision == 0 ? 3 : 2,
            dynamic && !given && asymmetric, bf16, {out, x.type(), bias_values.get(), w.rows}};
  }
};

void run(const LinearCalls& calls) {
  const Rows& x = calls[0].x;
  if (!x.count || !calls[0].w.rows) return;
  if (x.count <= kernels->few) return few_rows(calls);
  const bool is_bf16 = calls[0].bf16 && kernels->bf16_tiles;
  for (int64_t m = 0; m < x.count; m += ROWS)
    (is_bf16 ? many_bf16_rows : many_rows)(calls, m, std::min(ROWS, x.count - m));
}

// Layers that follow each other here share activations if they are alike.
void run_each(LinearCalls calls) {
  const bool alike = std::all_of(calls.begin(), calls.end(), [&](const LinearCall& each) {
    return each.w.rows && each.is_like(calls[0]);
  });
  if (alike) return run(calls);
  for (const LinearCall& each : calls) run({each});
}

// The empty result of a layer for activations `x`.
Tensor empty_result(const Tensor& x, int64_t out_features) {
  int64_t sizes[16];
  require(x.dim() > 0 && x.dim() <= 16, "no dimensions, or more than 16");
  std::copy(x.sizes(), x.sizes() + x.dim(), sizes);
  sizes[x.dim() - 1] = out_features;
  return Tensor::empty(x.dim(), sizes, x.dtype());
}

Tensor apply(const Tensor& x, Layer& layer) {
  const Rows rows(x);
  Tensor result = empty_result(x, layer.out_features());
  run({layer.call(rows, result.data<void>())});
  return result;
}

// int4_linear_cpu, int8_linear_cpu(x, weight, weight_scale, weight_zero_point?, input_scale?, bias?, dynamic, asymmetric,
// precision) -> Tensor
template <int BITS>
void linear(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]);
  Layer layer(stack + 1, BITS, stack[6] & 1, stack[7] & 1, int64_t(stack[8]));
  stack[0] = apply(x, layer).result();
}

// activated_linear_cpu(x, five tensors of a layer, layouts, kind) -> Tensor
void activated_linear(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]);
  Layer layer(stack + 1, int64_t(stack[6]));
  const Rows rows(x);
  Tensor result = empty_result(x, layer.out_features());
  LinearCall call = layer.call(rows, result.data<void>());
  call.out.act = gate_of(stack[7]);
  run({call});
  stack[0] = result.result();
}

// gated_mlp_cpu(x, gate and up and down: five tensors each, layouts, kind) -> Tensor; `layouts` has a byte for each layer.
void gated_mlp(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]);
  const int64_t layouts = int64_t(stack[16]);
  Layer gate(stack + 1, layouts), up(stack + 6, layouts >> 8), down(stack + 11, layouts >> 16);
  const Rows rows(x);
  const Tensor left = empty_result(x, gate.out_features()), right = empty_result(x, up.out_features());
  run_each({gate.call(rows, left.data<void>()), up.call(rows, right.data<void>())});
  gate_into(left, right, gate_of(stack[17]), left);
  stack[0] = apply(left, down).result();
}

// rotated_heads_cpu(x, q and k and v: five tensors each, cos, sin, layouts, size) -> (Tensor, Tensor, Tensor)
void rotated_heads(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]);
  const int64_t layouts = int64_t(stack[18]), size = int64_t(stack[19]);
  Layer layers[3] = {{stack + 1, layouts}, {stack + 6, layouts >> 8}, {stack + 11, layouts >> 16}};
  const Tensor cos = Tensor::argument(stack[16]), sin = Tensor::argument(stack[17]);
  require(x.dim() == 3 && size > 0, "activations of attention have three dimensions");
  const int64_t batch = x.sizes()[0], tokens = x.sizes()[1];
  const Rows rows(x);
  Tensor results[3];
  LinearCalls calls;
  for (int i = 0; i < 3; i++) {
    const int64_t width = layers[i].out_features(), sizes[4] = {batch, width / size, tokens, size};
    const int64_t strides[4] = {tokens * width, size, width, 1};
    require(width % size == 0, "a projection is no whole number of heads");
    results[i] = Tensor::empty_strided(4, sizes, strides, x.dtype());
    calls.push_back(layers[i].call(rows, results[i].data<void>()));
  }
  run_each(std::move(calls));
  rotate(results[0], results[1], cos, sin, results);
  for (int i = 0; i < 3; i++) stack[i] = results[i].result();
}

}  // namespace
}  // namespace hfquant

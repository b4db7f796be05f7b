// Attention; see attention_rows.h. Included by ops.cpp.
#pragma once
#include "arguments.h"
#include "between_ops.h"

namespace hfquant {
namespace {

// Rows that share packed keys, a multiple of a tile: 192 make packing a fortieth of the work. Fewer keep threads busy.
int64_t span_of(int64_t rows, int64_t heads) {
  uint32_t threads = 1;
  check(torch.torch_get_num_threads(&threads), "get_num_threads");
  const int64_t parts = threads > 1 ? std::max<int64_t>(1, 4 * int64_t(threads) / std::max<int64_t>(1, heads)) : 1;
  return std::min<int64_t>(192, std::max<int64_t>(24, round_up((rows + parts - 1) / parts, 12)));
}

Heads heads_of(const Tensor& x, int64_t batch, int32_t dtype) {
  require(x.dim() == 4 && x.sizes()[0] == batch && x.dtype() == dtype, "queries, keys and values do not fit");
  const int64_t* strides = x.strides();
  require(strides[3] == 1 || x.sizes()[3] <= 1, "the values of a head must be neighbours");
  return {x.data<char>(), {strides[0], strides[1], strides[2]}};
}

void read_mask(const Tensor& mask, Attention& a, int64_t batch, int32_t dtype) {
  const int64_t *sizes = mask.sizes(), wanted[4] = {batch, a.heads, a.tokens, a.keys};
  require(mask.dim() == 4 && sizes[3] == a.keys && (mask.strides()[3] == 1 || a.keys <= 1), "the mask does not fit");
  for (int i = 0; i < 3; i++) {
    require(sizes[i] == wanted[i] || sizes[i] == 1, "the mask does not fit");
    a.mask_strides[i] = sizes[i] == 1 ? 0 : mask.strides()[i];
  }
  const bool chosen = mask.dtype() == torch.aoti_torch_dtype_bool();
  require(chosen || mask.dtype() == dtype, "a mask is bool or has the dtype of the queries");
  a.mask = chosen ? Mask::chosen : Mask::added;
  a.mask_data = mask.data<void>();
}

// attention_cpu(q, k, v, mask?, scale, causal) -> Tensor
void attention(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor q = Tensor::argument(stack[0]), k = Tensor::argument(stack[1]), v = Tensor::argument(stack[2]);
  const Tensor mask = Tensor::optional(stack[3]);
  const int64_t batch = q.sizes()[0];
  const int32_t dtype = q.dtype();
  Attention a = {heads_of(q, batch, dtype), heads_of(k, batch, dtype), heads_of(v, batch, dtype)};
  a.type = float_type(dtype);
  a.heads = q.sizes()[1], a.tokens = q.sizes()[2], a.size = q.sizes()[3];
  a.key_heads = k.sizes()[1], a.keys = k.sizes()[2], a.value_size = v.sizes()[3];
  a.scale = float(real(stack[4])), a.causal = stack[5] & 1;
  require(a.key_heads > 0 && a.heads % a.key_heads == 0 && v.sizes()[1] == a.key_heads && v.sizes()[2] == a.keys &&
              k.sizes()[3] == a.size && a.size > 0,
          "queries, keys and values do not fit");
  if (mask) read_mask(mask, a, batch, dtype);
  const int64_t sizes[4] = {batch, a.tokens, a.heads, a.value_size};
  Tensor result = Tensor::empty(4, sizes, dtype);
  a.out = result.data<char>();
  const int64_t rows = a.heads / a.key_heads * a.tokens, heads = batch * a.key_heads, span = span_of(rows, heads);
  const int64_t spans = (rows + span - 1) / span, work = std::min(rows, span) * a.keys * (a.size + a.value_size);
  parallel_for(heads * spans, std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    auto* memory = scratch.take<float>(attention_scratch(a, std::min(rows, span)));
    for (int64_t i = begin; i < end; i++) {
      const int64_t head = i / spans, first = i % spans * span;
      kernels->attention_rows(a, head / a.key_heads, head % a.key_heads, first, std::min(first + span, rows), memory);
    }
  });
  stack[0] = result.result();
}

}  // namespace
}  // namespace hfquant

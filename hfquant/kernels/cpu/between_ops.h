// Ops between quantized layers; see between_rows.h. Included by ops.cpp.
#pragma once
#include "arguments.h"
#include "training_ops.h"

namespace hfquant {
namespace {

double real(StableIValue value) {
  double out;
  std::memcpy(&out, &value, 8);
  return out;
}

// The contiguous `tensor` as float32, plus `offset`.
Buffer<float> float_values(const Tensor& tensor, float offset) {
  const int64_t count = tensor.numel();
  auto out = buffer<float>(count);
  kernels->to_float(tensor.data<void>(), float_type(tensor.dtype()), count, out.get());
  for (int64_t i = 0; offset != 0 && i < count; i++) out[i] += offset;
  return out;
}

// rms_norm_cpu(x, weight, eps, unit_offset, round_first) -> Tensor
void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = Tensor::argument(stack[0]), weight = Tensor::argument(stack[1]);
  const float eps = float(real(stack[2]));
  const bool round_first = stack[4] & 1;
  const Rows rows(x);
  require(weight.numel() == rows.length, "the weight of a norm does not fit");
  const bool offset = stack[3] & 1, as_is = !offset && rows.type() == Float::f32;
  require(weight.contiguous() && weight.dtype() == x.dtype(), "the weight of a norm must be contiguous, in the dtype of x");
  const auto converted = as_is ? Buffer<float>() : float_values(weight, offset ? 1.0f : 0.0f);
  const float* factors = as_is ? weight.data<float>() : converted.get();
  Tensor result = Tensor::empty(x.dim(), x.sizes(), x.dtype());
  char* out = result.data<char>();
  const int64_t length = rows.length, size = size_of(rows.type());
  parallel_for(rows.count, std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, length)),
               [&](int64_t begin, int64_t end) {
                 Scratch scratch;
                 auto *read = scratch.take<float>(2 * length), *values = scratch.take<float>(length);
                 for (int64_t m = begin; m < end; m++) {
                   char* to = out + m * length * size;
                   float* in_place = rows.type() == Float::f32 ? reinterpret_cast<float*>(to) : values;
                   kernels->rms_norm_row(rows.read(m, read), rows.type(), length, factors, eps, round_first, in_place,
                                         to);
                 }
               });
  stack[0] = result.result();
}

Gate gate_of(StableIValue kind) {
  require(kind <= uint64_t(Gate::gelu), "there is no such activation");
  return Gate(int64_t(kind));
}

// act(gate) * up into `result`, which may be `gate`.
void gate_into(const Tensor& gate, const Tensor& up, Gate kind, const Tensor& result) {
  const Float type = float_type(gate.dtype());
  const int64_t count = gate.numel(), size = size_of(type);
  require(gate.contiguous() && (!up || (up.dtype() == gate.dtype() && up.numel() == count && up.contiguous())),
          "gate and up must be contiguous and alike");
  const char *left = gate.data<char>(), *right = up ? up.data<char>() : nullptr;
  char* out = result.data<char>();
  parallel_for(count, 8 << 10, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    kernels->gated_row(left + at, right ? right + at : nullptr, type, end - begin, kind, out + at);
  });
}

// gated_product_cpu(gate, up?, kind) -> Tensor
void gated_product(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor gate = Tensor::argument(stack[0]), up = Tensor::optional(stack[1]);
  Tensor result = Tensor::empty(gate.dim(), gate.sizes(), gate.dtype());
  gate_into(gate, up, gate_of(stack[2]), result);
  stack[0] = result.result();
}

// An empty tensor like `x [batch, heads, tokens, size]`, with heads of a token side by side where `x` has them so.
Tensor empty_heads(const Tensor& x) {
  const int64_t *sizes = x.sizes(), *from = x.strides();
  const bool by_token = from[1] < from[2];
  const int64_t strides[4] = {sizes[1] * sizes[2] * sizes[3], by_token ? sizes[3] : sizes[2] * sizes[3],
                              by_token ? sizes[1] * sizes[3] : sizes[3], 1};
  return Tensor::empty_strided(4, sizes, strides, x.dtype());
}

// Turns queries and keys into `results`, which may be their own.
void rotate(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const Tensor* results) {
  require(q.dim() == 4 && k.dim() == 4 && cos.dim() == 3 && sin.dim() == 3, "heads have four dimensions, angles three");
  const int64_t batch = q.sizes()[0], tokens = q.sizes()[2], size = q.sizes()[3];
  const Float type = float_type(q.dtype());
  const bool shared = cos.sizes()[0] == 1;
  for (const Tensor* angle : {&cos, &sin})
    require(angle->contiguous() && angle->sizes()[0] == cos.sizes()[0] && (shared || cos.sizes()[0] == batch) &&
                angle->sizes()[1] == tokens && angle->sizes()[2] == size && angle->dtype() == q.dtype(),
            "cos and sin do not fit");
  require(k.sizes()[0] == batch && k.sizes()[2] == tokens && k.sizes()[3] == size && k.dtype() == q.dtype() &&
              size % 2 == 0 && q.strides()[3] == 1 && k.strides()[3] == 1,
          "queries and keys do not fit");
  const int64_t bytes = size_of(type), heads = q.sizes()[1] + k.sizes()[1];
  each_row(batch * tokens, heads * size, [&](int64_t i) {
    Scratch scratch;
    float *angles = scratch.take<float>(2 * size), *values = scratch.take<float>(2 * size), *read = scratch.take<float>(size);
    const int64_t b = i / tokens, t = i % tokens, at = (shared ? t : i) * size * bytes;
    kernels->to_float(cos.data<char>() + at, type, size, angles);
    kernels->to_float(sin.data<char>() + at, type, size, angles + size);
    for (int which = 0; which < 2; which++) {
      const Tensor &from = which ? k : q, &to = results[which];
      const int64_t *in = from.strides(), *out = to.strides();
      for (int64_t h = 0; h < from.sizes()[1]; h++) {
        kernels->to_float(from.data<char>() + (b * in[0] + h * in[1] + t * in[2]) * bytes, type, size, read);
        kernels->rotate_row(read, type, size, angles, angles + size, values,
                            to.data<char>() + (b * out[0] + h * out[1] + t * out[2]) * bytes);
      }
    }
  });
}

// rotary_cpu(q, k, cos, sin) -> (Tensor, Tensor)
void rotary(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor q = Tensor::argument(stack[0]), k = Tensor::argument(stack[1]);
  const Tensor cos = Tensor::argument(stack[2]), sin = Tensor::argument(stack[3]);
  require(q.dim() == 4 && k.dim() == 4, "heads have four dimensions");
  Tensor results[2] = {empty_heads(q), empty_heads(k)};
  rotate(q, k, cos, sin, results);
  stack[0] = results[0].result();
  stack[1] = results[1].result();
}

}  // namespace
}  // namespace hfquant

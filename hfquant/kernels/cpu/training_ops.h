// Ops on weights that training rounds; see training_rows.h. Included by ops.cpp.
#pragma once
#include <algorithm>

#include "arguments.h"

namespace hfquant {
namespace {

// Calls `body` with every row, on all threads; a row has `length` weights.
template <class Body>
void each_row(int64_t rows, int64_t length, const Body& body) {
  parallel_for(rows, std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, length)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) body(n);
  });
}

// The arguments that grid_weight_cpu and grid_weight_backward_cpu share: codes, residual?, delta, scale, zero?, bits.
struct GridCall {
  explicit GridCall(StableIValue* stack)
      : codes(Tensor::argument(stack[0])),
        residual(Tensor::optional(stack[1])),
        delta(Tensor::argument(stack[2])),
        scale(Tensor::argument(stack[3])),
        zero(Tensor::optional(stack[4])) {
    Weight& w = view.weight;
    w.bits = int(stack[5]);
    w.rows = delta.sizes()[0];
    w.in_features = delta.sizes()[1];
    w.row_bytes = (w.in_features * w.bits + 31) / 32 * 4;
    w.groups = scale.sizes()[1];
    w.codes = codes.data<uint8_t>();
    require(codes.numel() * 4 == w.rows * w.row_bytes && w.groups > 0 && w.in_features % w.groups == 0 &&
                scale.numel() == w.rows * w.groups,
            "codes and scales do not fit");
    view.residual_bytes = (w.in_features * 4 + 31) / 32 * 4;
    if (residual) {
      require(residual.numel() * 4 == w.rows * view.residual_bytes, "residuals do not fit");
      view.residual = residual.data<uint8_t>();
    }
    if (zero) {
      w.zero_bytes = (w.groups * w.bits + 31) / 32 * 4;
      require(zero.numel() * 4 == w.rows * w.zero_bytes, "zero points do not fit");
      w.zero = zero.data<uint8_t>();
    }
    view.delta = delta.data<float>();
    view.scale = scale.data<float>();
  }
  Tensor codes, residual, delta, scale, zero;
  Grid view{};
};

// grid_weight_cpu(codes, residual?, delta, scale, zero_point?, bits, dtype) -> Tensor
void grid_weight(StableIValue* stack, uint64_t, uint64_t) {
  const GridCall call(stack);
  const int32_t dtype = int32_t(stack[6]);
  const Float type = float_type(dtype);
  Tensor result = Tensor::empty(2, call.delta.sizes(), dtype);
  char* out = result.data<char>();
  const Weight& w = call.view.weight;
  const int64_t row = w.in_features * size_of(type);
  each_row(w.rows, w.in_features, [&](int64_t n) { kernels->grid_row(call.view, n, type, out + n * row); });
  stack[0] = result.result();
}

// grid_weight_backward_cpu(grad, codes, residual?, delta, scale, zero_point?, bits) -> (Tensor, Tensor)
void grid_weight_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = Tensor::argument(stack[0]);
  const GridCall call(stack + 1);
  const Weight& w = call.view.weight;
  Tensor grad_delta = Tensor::empty(2, call.delta.sizes(), torch.aoti_torch_dtype_float32());
  Tensor grad_scale = Tensor::empty(2, call.scale.sizes(), torch.aoti_torch_dtype_float32());
  const float* from = grad.data<float>();
  float *delta = grad_delta.data<float>(), *scale = grad_scale.data<float>();
  each_row(w.rows, w.in_features, [&](int64_t n) {
    kernels->grid_gradients(call.view, n, from + n * w.in_features, delta + n * w.in_features, scale + n * w.groups);
  });
  stack[0] = grad_delta.result();
  stack[1] = grad_scale.result();
}

// The arguments that fake_quantize_cpu and fake_quantize_backward_cpu share: x, scale, zero_point?, bits.
struct ValuesCall {
  explicit ValuesCall(StableIValue* stack)
      : x(Tensor::argument(stack[0])), scale(Tensor::argument(stack[1])), zero(Tensor::optional(stack[2])) {
    view.bits = int(stack[3]);
    view.length = x.sizes()[x.dim() - 1];
    view.groups = scale.sizes()[scale.dim() - 1];
    view.rows = x.numel() / std::max<int64_t>(1, view.length);
    require(view.groups > 0 && view.length % view.groups == 0 && scale.numel() == view.rows * view.groups &&
                (!zero || zero.numel() == scale.numel()),
            "scales do not fit");
    view.x = x.data<float>();
    view.scale = scale.data<float>();
    view.zero = zero ? zero.data<int8_t>() : nullptr;
  }
  Tensor x, scale, zero;
  Values view{};
};

// fake_quantize_cpu(x, scale, zero_point?, bits) -> Tensor
void fake_quantize(StableIValue* stack, uint64_t, uint64_t) {
  const ValuesCall call(stack);
  Tensor result = Tensor::empty(call.x.dim(), call.x.sizes(), torch.aoti_torch_dtype_float32());
  float* out = result.data<float>();
  const Values& v = call.view;
  each_row(v.rows, v.length, [&](int64_t n) { kernels->fake_quantize_row(v, n, out + n * v.length); });
  stack[0] = result.result();
}

// fake_quantize_backward_cpu(grad, x, scale, zero_point?, bits) -> (Tensor, Tensor)
void fake_quantize_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = Tensor::argument(stack[0]);
  const ValuesCall call(stack + 1);
  const Values& v = call.view;
  require(grad.numel() == call.x.numel(), "the gradient does not fit");
  Tensor grad_x = Tensor::empty(call.x.dim(), call.x.sizes(), torch.aoti_torch_dtype_float32());
  Tensor grad_scale = Tensor::empty(call.scale.dim(), call.scale.sizes(), torch.aoti_torch_dtype_float32());
  const float* from = grad.data<float>();
  float *values = grad_x.data<float>(), *scales = grad_scale.data<float>();
  each_row(v.rows, v.length, [&](int64_t n) {
    kernels->fake_quantize_gradients(v, n, from + n * v.length, values + n * v.length, scales + n * v.groups);
  });
  stack[0] = grad_x.result();
  stack[1] = grad_scale.result();
}

}  // namespace
}  // namespace hfquant

"""Plain torch for ``grid_linear`` and its gradients."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from hfquant.kernels.grid_weight.reference import grid_codes, unrounded_weight
from hfquant.kernels.int8_linear.reference import linear_on_codes
from hfquant.kernels.quantize_rows.reference import quantized_values
from hfquant.numerics.affine import scale_from_bits, split_groups
from hfquant.numerics.packing import unpack
from hfquant.numerics.straight_through import activation_gradients, learned_scale, row_values


def grid_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    log_scale: Tensor,
    residual: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    input_scale: Tensor | None,
    input_log_scale: Tensor | None,
    bias: Tensor | None,
    lora_factor: float,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
    rounded: bool,
) -> Tensor:
    """See ``hfquant.kernels.grid_linear.grid_linear``."""
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        scale = scale_now(weight_scale, log_scale)
        input_scale = input_scale_now(input_scale, input_log_scale)
        delta = lora_steps(lora_a, lora_b, lora_factor, weight_scale)
        if delta is not None and not (rounded and (dynamic or input_scale is not None)):
            packed = weight, residual, delta, scale, zero_point, bits, rounded
            values = _values(*packed, dtype=x.dtype, length=x.shape[-1])
            return linear(quantized_values(x, input_scale, dynamic, asymmetric), values, bias)
        codes = codes_now(weight, residual, delta, bits=bits, length=x.shape[-1])
        zero = unpacked_zero(zero_point, scale, bits)
        return linear_on_codes(x, codes, scale, zero, input_scale, bias, dynamic, asymmetric)


def grid_linear_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    log_scale: Tensor,
    residual: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    input_scale: Tensor | None,
    input_log_scale: Tensor | None,
    lora_factor: float,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
    rounded: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_scale, lora_a, lora_b and input_log_scale; those nobody needs are empty."""
    grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = grad_scale = grad_a = grad_b = grad_input_scale = x.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        scale, delta = scale_now(weight_scale, log_scale), lora_steps(lora_a, lora_b, lora_factor, weight_scale)
        input_scale = input_scale_now(input_scale, input_log_scale)
        packed = weight, residual, delta, scale, zero_point, bits, rounded
        if needs_x:
            grad_x = grad_rows @ _values(*packed, dtype=grad.dtype, length=x.shape[-1])
            if input_scale is not None:
                grad_x, grad_input_scale = activation_gradients(grad_x, rows, input_scale)
            grad_x = grad_x.view(x.shape)
        if needs_weight:
            wide = torch.promote_types(torch.promote_types(x.dtype, log_scale.dtype), torch.float32)
            grad_weight = (grad_rows.t() @ quantized_values(rows, input_scale, dynamic, asymmetric)).to(wide)
            grad_delta, grad_scale = _weight_gradients(grad_weight, *packed)
            if lora_a is not None and lora_b is not None:
                grad_delta = in_units_(grad_delta, weight_scale)
                grad_a = (lora_b.t().to(grad_delta) @ grad_delta).mul_(lora_factor)
                grad_b = (grad_delta @ lora_a.t().to(grad_delta)).mul_(lora_factor)
    return grad_x, grad_scale, grad_a, grad_b, grad_input_scale


def scale_now(weight_scale: Tensor, log_scale: Tensor) -> Tensor:
    """Scales of the current state, float32, bfloat16-representable."""
    return learned_scale(scale_from_bits(weight_scale), log_scale)


def input_scale_now(input_scale: Tensor | None, input_log_scale: Tensor | None) -> Tensor | None:
    """The static activation scale of the current state ``[1]``, float32; ``None`` where there is none."""
    if input_scale is None or input_log_scale is None:
        return None if input_scale is None else scale_from_bits(input_scale)
    return scale_now(input_scale, input_log_scale)


def lora_steps(lora_a: Tensor | None, lora_b: Tensor | None, factor: float, weight_scale: Tensor) -> Tensor | None:
    """``factor * lora_b @ lora_a / initial_scale``: what the adapter adds inside the rounding, in steps ``[N, K]``."""
    return None if lora_a is None or lora_b is None else in_units_((lora_b * factor) @ lora_a, weight_scale)


def in_units_(values: Tensor, weight_scale: Tensor) -> Tensor:
    """``values [N, K]`` in units of the initial scale of each group, in place."""
    groups = values.view(*weight_scale.shape, values.shape[-1] // weight_scale.shape[-1])
    groups.div_(scale_from_bits(weight_scale).unsqueeze(-1))
    return values


def codes_now(weight: Tensor, residual: Tensor | None, delta: Tensor | None, *, bits: int, length: int) -> Tensor:
    """Codes of the current state ``[N, K]``, int8."""
    if delta is None:
        return unpack(weight, bits=bits, length=length)
    return grid_codes(weight, residual, delta, bits=bits)


def unpacked_zero(zero_point: Tensor | None, scale: Tensor, bits: int) -> Tensor | None:
    """Zero points ``[N, K // G]``, int8."""
    return None if zero_point is None else unpack(zero_point, bits=bits, length=scale.shape[-1])


def _values(
    weight: Tensor,
    residual: Tensor | None,
    delta: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    rounded: bool,
    *,
    dtype: torch.dtype,
    length: int,
) -> Tensor:
    """The dense weight ``[N, K]`` of the current state; without an adapter there is nothing to round."""
    if delta is None:
        codes = unpack(weight, bits=bits, length=length)
        return row_values(codes, scale, unpacked_zero(zero_point, scale, bits), dtype=dtype)
    if not rounded:
        return unrounded_weight(weight, residual, delta, scale, zero_point, bits, dtype)
    out: Tensor = torch.ops.hfquant.grid_weight(weight, residual, delta, scale, zero_point, bits, dtype)
    return out


def _weight_gradients(
    grad: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    delta: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the product inside the rounding (empty if there is none) and of ``log_scale``."""
    if delta is not None and not rounded:
        grad_delta = split_groups(grad, grad.shape[-1] // scale.shape[-1]) * scale.unsqueeze(-1)
        return grad_delta.view(grad.shape), grad.new_zeros(scale.shape)
    if delta is not None:
        grad_delta, grad_scale = torch.ops.hfquant.grid_weight_backward(
            grad, weight, residual, delta, scale.to(grad.dtype), zero_point, bits
        )
        return grad_delta, grad_scale * scale
    ones = torch.ones_like(scale, dtype=grad.dtype)
    steps = row_values(
        unpack(weight, bits=bits, length=grad.shape[-1]), ones, unpacked_zero(zero_point, scale, bits), dtype=grad.dtype
    )
    groups = grad.shape[-1] // scale.shape[-1]
    return grad.new_empty(0), torch.linalg.vecdot(split_groups(grad, groups), split_groups(steps, groups)) * scale

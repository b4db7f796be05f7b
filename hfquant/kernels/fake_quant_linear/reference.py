"""Plain torch for ``fake_quant_linear`` and its gradients."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from hfquant.kernels.fake_quantize import fake_quantize
from hfquant.kernels.int8_linear.reference import linear_on_codes
from hfquant.kernels.quantize_rows.reference import quantized_values
from hfquant.numerics.straight_through import (
    activation_gradients,
    learned_scale,
    row_codes,
    row_values,
    weight_gradients,
)


def learned_scale_reference(initial_bits: Tensor, log_scale: Tensor) -> Tensor:
    """See ``hfquant.kernels.fake_quant_linear.learned_scale_from_bits``."""
    return learned_scale(initial_bits.view(torch.float32), log_scale)


def fake_quant_linear_reference(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codes: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    input_log_scale: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    lora_factor: float,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
    blend: float,
) -> Tensor:
    """See ``hfquant.kernels.fake_quant_linear.fake_quant_linear``."""
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if codes is None:
            adapted = adapted_weight(weight, lora_a, lora_b, lora_factor)
            if blend == 1.0 and not dynamic and input_scale is None:
                return linear(x, _values(adapted, None, scale, zero_point, bits, x.dtype), bias)
            codes = row_codes(adapted, scale, zero_point, bits=bits)
        if blend == 1.0:
            return linear_on_codes(x, codes, scale, zero_point, input_scale, bias, dynamic, asymmetric)
        weight = adapted_weight(weight, lora_a, lora_b, lora_factor)
        values = _blended_weight(weight, codes, scale, zero_point, bits, blend, x.dtype)
        return linear(_blended_activations(x, input_scale, dynamic, asymmetric, blend), values, bias)


def fake_quant_linear_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codes: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    input_scale: Tensor | None,
    lora_factor: float,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
    blend: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, log_scale, lora_a, lora_b and input_log_scale; those nobody needs are empty."""
    grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = grad_weight = grad_scale = grad_a = grad_b = grad_input_scale = x.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        adapted = adapted_weight(weight, lora_a, lora_b, lora_factor)
        if needs_x:
            grad_x = grad_rows @ _blended_weight(adapted, codes, scale, zero_point, bits, blend, grad.dtype)
            if input_scale is not None:
                grad_x, grad_input_scale = activation_gradients(grad_x, rows, input_scale, blend=blend)
            grad_x = grad_x.view(x.shape)
        if needs_weight:
            inputs = _blended_activations(rows, input_scale, dynamic, asymmetric, blend)
            wide = torch.promote_types(adapted.dtype, torch.float32)
            product = (grad_rows.t() @ inputs).to(wide)
            grad_weight, grad_scale = _weight_gradients(product, adapted, scale, zero_point, bits, blend)
            if lora_a is not None and lora_b is not None:
                grad_a = (lora_b.t().to(wide) @ grad_weight).mul_(lora_factor)
                grad_b = (grad_weight @ lora_a.t().to(wide)).mul_(lora_factor)
            grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight, grad_scale, grad_a, grad_b, grad_input_scale


def adapted_weight(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, factor: float) -> Tensor:
    """``weight + factor * lora_b @ lora_a``, in float32 where there is an adapter; one expert at a time."""
    if lora_a is None or lora_b is None:
        return weight
    if weight.ndim == 3:  # a batched product may round differently than the forward's, which is not
        return torch.stack([adapted_weight(*part, factor) for part in zip(weight, lora_a, lora_b, strict=True)])
    return torch.addmm(weight.to(lora_b.dtype), lora_b, lora_a, alpha=factor)


def _values(
    weight: Tensor, codes: Tensor | None, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """What ``weight`` is rounded to; from its codes if they are known, else in one pass where there is a kernel."""
    if codes is None and weight.dtype == torch.float32:
        # A transposed weight would give transposed values, and a product of them rounds differently in the last bit.
        return fake_quantize(weight.contiguous(), scale, zero_point, bits=bits).to(dtype)
    codes = row_codes(weight, scale, zero_point, bits=bits) if codes is None else codes
    return row_values(codes, scale, zero_point, dtype=dtype)


def _weight_gradients(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, blend: float
) -> tuple[Tensor, Tensor]:
    """``weight_gradients``, in one pass where there is a kernel."""
    if blend < 1.0 or not grad.dtype == weight.dtype == torch.float32:
        return weight_gradients(grad, weight, scale, zero_point, bits=bits, blend=blend)
    found = torch.ops.hfquant.fake_quantize_backward(grad, weight.contiguous(), scale, zero_point, bits)
    return found[0], found[1] * scale


def _blended_weight(
    weight: Tensor,
    codes: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    blend: float,
    dtype: torch.dtype,
) -> Tensor:
    values = _values(weight, codes, scale, zero_point, bits, dtype)
    return values if blend == 1.0 else torch.lerp(weight.to(dtype), values, blend)


def _blended_activations(
    x: Tensor, input_scale: Tensor | None, dynamic: bool, asymmetric: bool, blend: float
) -> Tensor:
    """What the weight is multiplied with, in the dtype of ``x``."""
    values = quantized_values(x, input_scale, dynamic, asymmetric)
    return values if blend == 1.0 or values is x else torch.lerp(x, values, blend)

"""Gradients straight through the rounding, and scales that are learned on the grid.

With ``steps = w / s``, ``rounded = round(steps) + z``, ``codes = clamp(rounded)`` and ``m = 1[rounded == codes]``,

    values     = (codes - z) * s
    d values/dw = m                                     straight through the rounding, clipped outside the range
    d values/du = s * (codes - z - m * steps)           for a learned scale s = s0 * exp(u)

References:
    Bengio et al. 2013, https://arxiv.org/abs/1308.3432 (straight through); Esser et al. 2020, eq. 3,
    https://arxiv.org/abs/1902.08153 (learned step size; here relative, so that the sign never changes and one
    learning rate fits every layer).
"""

import torch
from torch import Tensor

from hfquant.numerics.affine import LARGEST_SCALE, SMALLEST_SCALE, code_range, dequantize, quantize, split_groups


def learned_scale(initial: Tensor, log_scale: Tensor) -> Tensor:
    """``initial * exp(log_scale)``, rounded to the grid of scales.

    Args:
        initial: Scale that training started from ``[..., G]``, float32, of either sign.
        log_scale: ``u``, the learned logarithm of its change ``[..., G]``, float32.

    Returns:
        Scale ``[..., G]``, float32, bfloat16-representable, of the sign of ``initial``.
    """
    # As round_scale does it, but 0 is no special case; every layer of a model needs this twice a step.
    magnitude = (initial.abs() * torch.exp(log_scale)).float().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return magnitude.to(torch.bfloat16).float().copysign(initial)


def row_codes(weight: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int) -> Tensor:
    """Codes of rows: ``quantize`` with the scale of each group.

    Args:
        weight: Values ``[..., K]``, any floating dtype.
        scale: ``[..., K // G]``, float32.
        zero_point: ``[..., K // G]``, int8, or ``None``.
        bits: Bits per code.

    Returns:
        Codes ``[..., K]``, int8.
    """
    groups = split_groups(weight, weight.shape[-1] // scale.shape[-1])
    codes = quantize(groups, scale.unsqueeze(-1), _unsqueezed(zero_point), bits=bits).flatten(-2)
    # A transposed weight would give transposed codes, and a product of them rounds differently in the last bit.
    return codes.contiguous()


def row_values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Values ``[..., K]`` in ``dtype`` of the ``codes`` that ``row_codes`` gives."""
    groups = split_groups(codes, codes.shape[-1] // scale.shape[-1])
    return dequantize(groups, scale.unsqueeze(-1), _unsqueezed(zero_point), dtype=dtype).flatten(-2)


def weight_gradients(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, blend: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of ``u``, from the gradient of the quantized weight.

    Args:
        grad: Gradient of the quantized values ``[..., K]``; it is overwritten.
        weight: Float weight ``[..., K]``.
        scale: ``[..., K // G]``, float32.
        zero_point: ``[..., K // G]``, int8, or ``None``.
        bits: Bits per code.
        blend: Share of the quantized values in what was computed with, ``weight + blend * (values - weight)``.

    Returns:
        Gradients ``[..., K]`` in the dtype of ``grad`` and ``[..., K // G]``.
    """
    size = weight.shape[-1] // scale.shape[-1]
    steps = split_groups(weight.float(), size) / scale.unsqueeze(-1)
    grad = split_groups(grad, size)
    codes = torch.round(steps)
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    smallest, largest = code_range(bits)
    outside = (codes < smallest).logical_or_(codes > largest)
    codes.clamp_(smallest, largest)
    if zero_point is not None:
        codes -= zero_point.unsqueeze(-1)
    error = codes.sub_(steps.masked_fill_(outside, 0.0))
    grad_scale = torch.linalg.vecdot(grad, error.to(grad.dtype)) * scale * blend
    return grad.mul_(outside.mul(-blend).add_(1.0).to(grad.dtype)).flatten(-2), grad_scale


def activation_gradients(grad: Tensor, x: Tensor, scale: Tensor, *, blend: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradients of static INT8 activations and of the ``u`` of their scale.

    Args:
        grad: Gradient of the quantized activations ``[M, K]``.
        x: Activations ``[M, K]``.
        scale: ``[1]``, float32.
        blend: As for ``weight_gradients``.

    Returns:
        Gradients ``[M, K]`` and ``[1]`` (float32 or wider).
    """
    steps = x.float() / scale
    codes = torch.round(steps).clamp_(*code_range(8))
    inside = (codes - steps).abs() <= 0.5
    error = codes - steps * inside
    grad_scale = (grad * error).sum(dtype=torch.promote_types(grad.dtype, torch.float32)) * scale * blend
    return grad * (1 - blend + blend * inside).to(grad.dtype), grad_scale


def _unsqueezed(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None else zero_point.unsqueeze(-1)

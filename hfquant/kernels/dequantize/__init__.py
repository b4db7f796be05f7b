"""Float weights of packed ones."""

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dequantize.reference import dequantize_reference
from hfquant.kernels.dispatch import define_op, register_native, register_triton


def _fake(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty((*weight.shape[:-1], in_features), dtype=dtype)


define_op(
    "dequantize(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, int bits, int in_features, "
    "ScalarType dtype) -> Tensor",
    reference=dequantize_reference,
    fake=_fake,
)
register_native(
    "dequantize",
    lambda weight, scale, zero, bits, inputs, dtype: (
        dtype in native.FLOATS
        and weight.numel() > 0
        and all(tensor is None or tensor.is_contiguous() for tensor in (weight, scale, zero))
    ),
)
register_triton("dequantize")


def dequantize_weight(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    *,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Float weight of a packed one: ``(codes - zero_point) * scale`` in float32, then cast to ``dtype``.

    Args:
        weight: Packed codes ``[..., N, W]``, int32.
        weight_scale: Bit patterns of the bfloat16 scales ``[..., N, K // G]``, int16.
        weight_zero_point: Packed zero points ``[..., N, ceil(K // G * bits / 32)]``, int32, or ``None``.
        bits: Bits per code, 4 or 8.
        in_features: K.
        dtype: Of the result.

    Returns:
        Weight ``[..., N, K]``.
    """
    out: Tensor = torch.ops.hfquant.dequantize(weight, weight_scale, weight_zero_point, bits, in_features, dtype)
    return out

"""Quantize and dequantize in one pass, with gradients for values and scales (quantization-aware training)."""

from typing import Any

import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels.dispatch import define_op, register_autograd, register_native, register_triton
from hfquant.kernels.fake_quantize.reference import fake_quantize_backward_reference, fake_quantize_reference


def _refuses(x: Tensor, *_: Any) -> str | None:
    return None if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else f"values are {x.dtype}"


def _is_native(*arguments: Any) -> bool:
    """Whether the native kernels take these tensors: floats in float32, zero points in int8."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return all(t.dtype in (torch.float32, torch.int8) and t.is_contiguous() and t.numel() > 0 for t in tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.bits = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_scale = torch.ops.hfquant.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits)
    return grad_x, grad_scale, None, None


define_op(
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, int bits) -> Tensor",
    reference=fake_quantize_reference,
    fake=lambda x, *_: x.new_empty(x.shape),
)
define_op(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, int bits) -> (Tensor, Tensor)",
    reference=fake_quantize_backward_reference,
    fake=lambda grad, x, scale, *_: (x.new_empty(x.shape), scale.new_empty(scale.shape)),
)
register_autograd("fake_quantize", _backward, _setup_context)
register_native("fake_quantize", _is_native)
register_native("fake_quantize_backward", _is_native)
register_triton("fake_quantize", _refuses)
register_triton("fake_quantize_backward", lambda grad, x, *_: _refuses(x))


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int) -> Tensor:
    """What the deployed layer will compute with: the values of the grid nearest to ``x``.

    The same values as ``numerics.affine.fake_quantize`` on the groups of ``x``, and NaN for NaN. The gradient passes
    straight through the rounding and stops where a code is clipped; that of a scale is the sum over its group of
    ``grad * (code - zero_point - inside * x / scale)``.

    Args:
        x: Values ``[..., K]``, any floating dtype.
        scale: Size of one step ``[..., K // G]``, float32, finite and not zero, of either sign.
        zero_point: Code of 0.0 ``[..., K // G]``, int8; ``None`` means 0.
        bits: Bits per code, 4 or 8.

    Returns:
        Values like ``x``.

    Raises:
        KernelError: If ``scale`` does not belong to groups of the rows of ``x``.

    References:
        Esser et al. 2020, eq. 3 to 5. https://arxiv.org/abs/1902.08153
    """
    rows, groups = scale.shape[:-1], scale.shape[-1]
    if rows != x.shape[:-1] or groups == 0 or x.shape[-1] % groups or scale.dtype != torch.float32:
        raise KernelError(
            f"fake_quantize: {scale.dtype} scales {list(scale.shape)} do not fit values {list(x.shape)}; "
            "give float32 scales [..., K // G] for values [..., K]"
        )
    out: Tensor = torch.ops.hfquant.fake_quantize(x, scale, zero_point, bits)
    return out

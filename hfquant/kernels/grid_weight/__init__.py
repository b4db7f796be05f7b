"""The weight of an adapter inside the rounding: ``(clamp(round(codes + residual / 16 + delta)) - zero) * scale``."""

from typing import Any

import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_autograd, register_native, register_triton
from hfquant.kernels.grid_weight.reference import grid_weight_backward_reference, grid_weight_reference
from hfquant.numerics.packing import packed_length


def _refuses(
    codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *_: Any
) -> str | None:
    size = delta.shape[-1] // scale.shape[-1]
    if bits != 4 or zero_point is not None:
        return "it is for symmetric INT4"
    if size % 8:
        return f"groups of {size} do not fill packed words"
    return None if delta.dtype in (torch.float32, torch.float16, torch.bfloat16) else f"delta is {delta.dtype}"


def _is_native(codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor, *rest: Any) -> bool:
    """Whether the native kernel takes these tensors, in float32."""
    tensors = [tensor for tensor in (codes, residual, delta, scale, rest[0]) if tensor is not None]
    return (
        delta.dtype == scale.dtype == torch.float32
        and (len(rest) < 3 or rest[2] in native.FLOATS)
        and delta.numel() > 0
        and all(tensor.is_contiguous() for tensor in tensors)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bits, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_delta, grad_scale = torch.ops.hfquant.grid_weight_backward(grad, *ctx.saved_tensors, ctx.bits)
    return None, None, grad_delta, grad_scale, None, None, None


_WEIGHT = "Tensor codes, Tensor? residual, Tensor delta, Tensor scale, Tensor? zero_point, int bits"

define_op(
    f"grid_weight({_WEIGHT}, ScalarType dtype) -> Tensor",
    reference=grid_weight_reference,
    fake=lambda codes, residual, delta, scale, zero_point, bits, dtype: delta.new_empty(delta.shape, dtype=dtype),
)
define_op(
    f"grid_weight_backward(Tensor grad, {_WEIGHT}) -> (Tensor, Tensor)",
    reference=grid_weight_backward_reference,
    fake=lambda grad, codes, residual, delta, scale, *_: (delta.new_empty(delta.shape), scale.new_empty(scale.shape)),
)
register_autograd("grid_weight", _backward, _setup_context)
register_native("grid_weight", _is_native)
register_native(
    "grid_weight_backward",
    lambda grad, *arguments: grad.dtype == torch.float32 and grad.is_contiguous() and _is_native(*arguments),
)
register_triton("grid_weight", _refuses)
register_triton("grid_weight_backward", lambda grad, *arguments: _refuses(*arguments))


def grid_weight(
    codes: Tensor,
    residual: Tensor | None,
    delta: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int = 4,
    dtype: torch.dtype,
) -> Tensor:
    """Float weight whose codes are ``clamp(round(codes + residual / 16 + delta))``, ties to even.

    Gradients pass straight through the rounding: that of ``delta`` is ``grad * scale`` where the code is not clipped,
    that of a scale is the sum over its group of ``grad * (code - zero_point)``.

    Args:
        codes: Packed codes ``[N, W]``, int32.
        residual: What rounding took from each weight, in sixteenths of a step, packed with 4 bits; ``None`` is 0.
        delta: The adapter's product ``B @ A`` times its factor ``[N, K]``, in steps, any floating dtype.
        scale: Size of one step ``[N, K // G]``, float32, of either sign.
        zero_point: Packed zero points ``[N, ceil(K // G * bits / 32)]``, int32, or ``None``.
        bits: Bits per code, 4 or 8.
        dtype: Of the result.

    Returns:
        Weight ``[N, K]``.

    Raises:
        KernelError: If the shapes do not belong together.

    References:
        Bondarenko et al. 2024 (LR-QAT), eq. 5 to 7. https://arxiv.org/abs/2406.06385
    """
    n, k = delta.shape
    expected = [(n, packed_length(k, bits)), (n, packed_length(k, 4))]
    fits = codes.shape == expected[0] and (residual is None or residual.shape == expected[1])
    if not fits or scale.shape[0] != n or k % scale.shape[1]:
        raise KernelError(
            f"grid_weight: codes {list(codes.shape)} and scales {list(scale.shape)} do not fit delta {[n, k]}; "
            f"give packed codes {list(expected[0])} and scales [{n}, K // G]"
        )
    out: Tensor = torch.ops.hfquant.grid_weight(codes, residual, delta, scale, zero_point, bits, dtype)
    return out

"""The INT4 weight of an adapter inside the rounding: ``clamp(round(codes + residual / 16 + delta)) * scale``."""

from typing import Any

import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels.dispatch import define_op, register_autograd, register_triton
from hfquant.kernels.grid_weight.reference import grid_weight_backward_reference, grid_weight_reference
from hfquant.numerics.packing import packed_length


def _refuses(codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor, *_: Any) -> str | None:
    size = delta.shape[-1] // scale.shape[-1]
    if size % 8:
        return f"groups of {size} do not fill packed words"
    return None if delta.dtype in (torch.float32, torch.float16, torch.bfloat16) else f"delta is {delta.dtype}"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_delta, grad_scale = torch.ops.hfquant.grid_weight_backward(grad, *ctx.saved_tensors)
    return None, None, grad_delta, grad_scale, None


define_op(
    "grid_weight(Tensor codes, Tensor? residual, Tensor delta, Tensor scale, ScalarType dtype) -> Tensor",
    reference=grid_weight_reference,
    fake=lambda codes, residual, delta, scale, dtype: delta.new_empty(delta.shape, dtype=dtype),
)
define_op(
    "grid_weight_backward(Tensor grad, Tensor codes, Tensor? residual, Tensor delta, Tensor scale) -> (Tensor, Tensor)",
    reference=grid_weight_backward_reference,
    fake=lambda grad, codes, residual, delta, scale: (delta.new_empty(delta.shape), scale.new_empty(scale.shape)),
)
register_autograd("grid_weight", _backward, _setup_context)
register_triton("grid_weight", _refuses)
register_triton("grid_weight_backward", lambda grad, *arguments: _refuses(*arguments))


def grid_weight(codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Float weight whose codes are ``clamp(round(codes + residual / 16 + delta), -8, 7)``, ties to even.

    Gradients pass straight through the rounding: that of ``delta`` is ``grad * scale`` where the code is not clipped,
    that of a scale is the sum over its group of ``grad * code``.

    Args:
        codes: Packed INT4 codes ``[N, W]``, int32.
        residual: What rounding took from each weight, in sixteenths of a step, packed like the codes; ``None`` is 0.
        delta: The adapter's product ``B @ A`` times its factor ``[N, K]``, in steps, any floating dtype.
        scale: Size of one step ``[N, K // G]``, float32, of either sign.
        dtype: Of the result.

    Returns:
        Weight ``[N, K]``.

    Raises:
        KernelError: If the shapes do not belong together.

    References:
        Bondarenko et al. 2024 (LR-QAT), eq. 5 to 7. https://arxiv.org/abs/2406.06385
    """
    n, k = delta.shape
    shapes = [codes.shape] if residual is None else [codes.shape, residual.shape]
    if any(shape != (n, packed_length(k, 4)) for shape in shapes) or scale.shape[0] != n or k % scale.shape[1]:
        raise KernelError(
            f"grid_weight: codes {list(codes.shape)} and scales {list(scale.shape)} do not fit delta {[n, k]}; "
            f"give packed codes {[n, packed_length(k, 4)]} and scales [{n}, K // G]"
        )
    out: Tensor = torch.ops.hfquant.grid_weight(codes, residual, delta, scale, dtype)
    return out

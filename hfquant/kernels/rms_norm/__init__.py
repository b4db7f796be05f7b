"""Root mean square norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), equation 4."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_autograd, register_native
from hfquant.kernels.rms_norm.reference import rms_norm_backward_reference, rms_norm_reference


def _fake(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, round_first: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.unit_offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = rms_norm_backward_reference(grad, x, weight, ctx.eps, ctx.unit_offset)
    return grad_x, grad_weight, None, None, None


def _is_native(x: Tensor, weight: Tensor, *_: Any) -> bool:
    fits = weight.dim() == 1 and x.dim() > 0 and 0 < x.size(-1) == weight.size(0)
    return fits and x.dtype in native.FLOATS and weight.dtype == x.dtype and weight.is_contiguous()


define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, bool unit_offset, bool round_first) -> Tensor",
    reference=lambda *arguments: rms_norm_reference(*arguments).contiguous(),
    fake=_fake,
)
register_autograd("rms_norm", _backward, _setup_context)
register_native("rms_norm", _is_native)

NATIVE: Any = torch.ops.hfquant.rms_norm_cpu.default
"""The native op without its check; it raises ``RuntimeError`` at what is not for it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, round_first: bool = True) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight``, computed in float32.

    Args:
        x: Activations ``[..., K]``.
        weight: ``[K]``, in the dtype of ``x``.
        eps: Added to the mean.
        unit_offset: Multiply by ``1 + weight`` instead (Gemma).
        round_first: Round the quotient to the dtype of ``x`` before the weight (Llama); only half precision shows it.

    Returns:
        ``[..., K]`` in the dtype of ``x``.
    """
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fits = not trains and x.is_cpu and native.is_active() and _is_native(x, weight)
    out: Tensor = (NATIVE if fits else torch.ops.hfquant.rms_norm)(x, weight, eps, unit_offset, round_first)
    return out

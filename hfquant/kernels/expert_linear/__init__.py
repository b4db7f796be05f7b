"""The linear layers of all experts of a mixture in one call, on rows sorted by expert."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels.dispatch import define_op, register_autograd, register_triton
from hfquant.kernels.expert_linear.reference import expert_linear_backward_reference, expert_linear_reference


def _fake(x: Tensor, ends: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _refuses(
    x: Tensor, ends: Any, weight: Any, scale: Tensor, zero: Any, input_scale: Any, bias: Any, dynamic: bool, *_: Any
) -> str | None:
    if dynamic or input_scale is not None:
        return "experts with integer activations run one after the other"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}, not float16 or bfloat16"
    size, groups = x.shape[-1] // scale.shape[-1], scale.shape[-1]
    fits = groups == 1 or size % 128 == 0 or size in (16, 32, 64)
    return None if fits else f"groups of {size} are not 16, 32, 64 or a multiple of 128"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, weight, weight_scale, zero_point, _, bias, *_, ctx.bits = inputs
    ctx.save_for_backward(ends, weight, weight_scale, zero_point)
    ctx.in_features, ctx.has_bias = x.shape[-1], bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ends, *packed = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hfquant.expert_linear_backward(grad, ends, *packed, ctx.bits, ctx.in_features)
    if ctx.has_bias and ctx.needs_input_grad[6]:
        expert = torch.searchsorted(ends, torch.arange(grad.shape[0], device=ends.device), right=True)
        grad_bias = grad.new_zeros((len(ends) + 1, grad.shape[1])).index_add(0, expert, grad)[:-1]
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


define_op(
    "expert_linear(Tensor x, Tensor expert_ends, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
    "Tensor? input_scale, Tensor? bias, bool dynamic, bool asymmetric, int bits) -> Tensor",
    reference=expert_linear_reference,
    fake=_fake,
)
define_op(
    "expert_linear_backward(Tensor grad, Tensor expert_ends, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero_point, int bits, int in_features) -> Tensor",
    reference=expert_linear_backward_reference,
    fake=lambda grad, *arguments: grad.new_empty((grad.shape[0], arguments[-1])),
)
register_autograd("expert_linear", _backward, _setup_context)
register_triton("expert_linear", _refuses)


def expert_linear(
    x: Tensor,
    expert_ends: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    bits: int,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dynamic: bool = False,
    asymmetric: bool = False,
) -> Tensor:
    """``x[rows of e] @ dequantize(weight[e]).T + bias[e]`` for every expert e; nothing waits for the GPU.

    The gradient of ``x`` and ``bias`` is that of the formula, one expert at a time; packed weights have none.

    Args:
        x: Activations ``[M, K]``, rows sorted by expert.
        expert_ends: Number of rows up to and with each expert ``[experts]``, int32, not decreasing, at most M.
        weight: Packed codes ``[experts, N, W]``, int32.
        weight_scale: Bit patterns of the bfloat16 scales ``[experts, N, K // G]``, int16.
        weight_zero_point: Packed zero points ``[experts, N, ceil(K // G * bits / 32)]``, int32, or ``None``.
        bits: Bits per code, 4 or 8.
        input_scale: Bit pattern of the static activation scale ``[1]``, int16; makes activations static INT8.
        bias: ``[experts, N]`` or ``None``.
        dynamic: Quantize activations to INT8 with one scale per row.
        asymmetric: With ``dynamic``: rows have a zero point too.

    Returns:
        ``[M, N]`` in the dtype of ``x``; rows beyond the last expert's are 0.
    """
    bias = None if bias is None else bias.to(x.dtype)
    out: Tensor = torch.ops.hfquant.expert_linear(
        x, expert_ends, weight, weight_scale, weight_zero_point, input_scale, bias, dynamic, asymmetric, bits
    )
    return out

"""Plain torch for ``grid_weight``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import code_range, split_groups
from hfquant.numerics.packing import unpack


def grid_weight_reference(
    codes: Tensor,
    residual: Tensor | None,
    delta: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """See ``hfquant.kernels.grid_weight.grid_weight``."""
    steps = grid_steps(codes, residual, delta, bits=bits).clamp_(*code_range(bits))
    grouped = _from_zero(split_groups(steps, delta.shape[-1] // scale.shape[-1]), zero_point, scale, bits)
    return grouped.mul_(scale.unsqueeze(-1)).to(dtype).view(delta.shape)


def grid_weight_backward_reference(
    grad: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    delta: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``delta`` and ``scale``; see ``hfquant.kernels.grid_weight.grid_weight``."""
    size = delta.shape[-1] // scale.shape[-1]
    steps = split_groups(grid_steps(codes, residual, delta, bits=bits), size)
    grouped = split_groups(grad.to(steps.dtype), size)
    clipped = steps.clamp(*code_range(bits))
    outside = clipped != steps
    grad_scale = torch.linalg.vecdot(grouped, _from_zero(clipped, zero_point, scale, bits))
    grad_delta = (grouped * scale.unsqueeze(-1)).masked_fill_(outside, 0.0)
    return grad_delta.to(delta.dtype).view(delta.shape), grad_scale.to(scale.dtype)


def grid_steps(codes: Tensor, residual: Tensor | None, delta: Tensor, *, bits: int) -> Tensor:
    """``round(codes + residual / 16 + delta)`` before clipping, ``[N, K]``, float32 or wider; codes are added first."""
    return float_steps(codes, residual, delta, bits=bits).round_()


def float_steps(codes: Tensor, residual: Tensor | None, delta: Tensor, *, bits: int) -> Tensor:
    """``codes + residual / 16 + delta``, what is rounded, ``[N, K]``, float32 or wider; codes are added first."""
    steps = unpack(codes, bits=bits, length=delta.shape[-1]).to(torch.promote_types(delta.dtype, torch.float32))
    if residual is not None:
        steps.add_(unpack(residual, bits=4, length=delta.shape[-1]), alpha=1 / 16)
    return steps.add_(delta)


def unrounded_weight(
    codes: Tensor,
    residual: Tensor | None,
    delta: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """``(codes + residual / 16 + delta - zero_point) * scale [N, K]``: the weight without rounding and clipping."""
    steps = split_groups(float_steps(codes, residual, delta, bits=bits), delta.shape[-1] // scale.shape[-1])
    return _from_zero(steps, zero_point, scale, bits).mul_(scale.unsqueeze(-1)).to(dtype).view(delta.shape)


def grid_codes(codes: Tensor, residual: Tensor | None, delta: Tensor, *, bits: int) -> Tensor:
    """The codes ``[N, K]`` (int8) that the weight has: the steps, clipped."""
    return grid_steps(codes, residual, delta, bits=bits).clamp_(*code_range(bits)).to(torch.int8)


def _from_zero(steps: Tensor, zero_point: Tensor | None, scale: Tensor, bits: int) -> Tensor:
    """Steps from 0.0, in place: ``steps [N, K // G, G]`` less the zero point of each group."""
    if zero_point is None:
        return steps
    return steps.sub_(unpack(zero_point, bits=bits, length=scale.shape[-1]).unsqueeze(-1))

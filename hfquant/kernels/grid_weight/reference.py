"""Plain torch for ``grid_weight``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import code_range, split_groups
from hfquant.numerics.packing import unpack


def grid_weight_reference(
    codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """See ``hfquant.kernels.grid_weight.grid_weight``."""
    steps = grid_steps(codes, residual, delta)
    grouped = split_groups(steps.clamp(*code_range(4)), delta.shape[-1] // scale.shape[-1])
    return (grouped * scale.unsqueeze(-1)).to(dtype).reshape(delta.shape)


def grid_weight_backward_reference(
    grad: Tensor, codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``delta`` and ``scale``; see ``hfquant.kernels.grid_weight.grid_weight``."""
    size = delta.shape[-1] // scale.shape[-1]
    steps = split_groups(grid_steps(codes, residual, delta), size)
    clipped, grouped = steps.clamp(*code_range(4)), split_groups(grad.float(), size)
    grad_delta = torch.where(clipped == steps, grouped * scale.unsqueeze(-1), 0)
    return grad_delta.to(delta.dtype).reshape(delta.shape), (grouped * clipped).sum(-1)


def grid_steps(codes: Tensor, residual: Tensor | None, delta: Tensor) -> Tensor:
    """``round(codes + residual / 16 + delta)`` before clipping, ``[N, K]`` float32; adding starts with the codes."""
    steps = unpack(codes, bits=4, length=delta.shape[-1]).float()
    if residual is not None:
        steps = steps + unpack(residual, bits=4, length=delta.shape[-1]).float() / 16
    return torch.round(steps + delta.float())

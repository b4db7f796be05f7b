"""Plain torch for ``rms_norm``."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, round_first: bool) -> Tensor:
    """See ``hfquant.kernels.rms_norm.rms_norm``."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    factor = weight.float() + 1 if unit_offset else weight.float()
    return (factor * (values.to(x.dtype).float() if round_first else values)).to(x.dtype)


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``."""
    values, grad = x.float(), grad.float()
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normed = values * inverse
    scaled = grad * (weight.float() + 1 if unit_offset else weight.float())
    grad_x = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)

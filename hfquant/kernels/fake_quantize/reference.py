"""Plain torch for ``fake_quantize``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import code_range, split_groups


def fake_quantize_reference(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """See ``hfquant.kernels.fake_quantize.fake_quantize``."""
    _, steps, shift = _steps(x, scale, zero_point)
    values = (steps.clamp(*code_range(bits)) - shift) * scale.unsqueeze(-1)
    return values.to(x.dtype).reshape(x.shape)


def fake_quantize_backward_reference(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``scale``; see ``hfquant.kernels.fake_quantize.fake_quantize``."""
    quotient, steps, shift = _steps(x, scale, zero_point)
    codes = steps.clamp(*code_range(bits))
    inside = codes == steps
    grouped = grad.reshape(quotient.shape)
    grad_scale = (grouped.float() * (codes - shift - torch.where(inside, quotient, 0))).sum(-1)
    return torch.where(inside, grouped, 0).to(x.dtype).reshape(x.shape), grad_scale


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``x / scale``, its rounding plus the zero point, before clipping, and the zero point, in groups."""
    quotient = split_groups(x, x.shape[-1] // scale.shape[-1]).float() / scale.unsqueeze(-1)
    shift = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    return quotient, torch.round(quotient) + shift.unsqueeze(-1), shift.unsqueeze(-1)

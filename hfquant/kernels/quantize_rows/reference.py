"""Plain torch for ``quantize_rows``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import choose_row_scale, code_range


def quantized_values(x: Tensor, scale: Tensor | None, dynamic: bool) -> Tensor:
    """The values that INT8 activations stand for, like ``x [..., K]``; ``x`` itself where they stay in float.

    Args:
        x: Activations.
        scale: Static scale ``[1]``, float32, or ``None``.
        dynamic: One scale per row instead.
    """
    if not dynamic and scale is None:
        return x
    codes, row_scale = quantize_rows_reference(x.reshape(-1, x.shape[-1]), scale)
    return (codes.to(row_scale.dtype) * row_scale).to(x.dtype).view(x.shape)


def quantize_rows_reference(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``hfquant.kernels.quantize_rows.quantize_rows``."""
    if scale is None:
        row_scale = choose_row_scale(x)
    else:
        nan = torch.full_like(scale, torch.nan)
        row_scale = torch.where(x.isnan().any(-1, keepdim=True), nan, scale)
    steps = torch.round(x.float() / row_scale).nan_to_num_(nan=0.0)
    return steps.clamp_(*code_range(8)).to(torch.int8), row_scale

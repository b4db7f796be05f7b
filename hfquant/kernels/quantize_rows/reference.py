"""Plain torch for ``quantize_rows``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import choose_row_scale, choose_row_scale_and_zero_point, code_range


def quantized_values(x: Tensor, scale: Tensor | None, dynamic: bool, asymmetric: bool = False) -> Tensor:
    """The values that INT8 activations stand for, like ``x [..., K]``; ``x`` itself where they stay in float.

    Args:
        x: Activations.
        scale: Static scale ``[1]``, float32, or ``None``.
        dynamic: One scale per row instead.
        asymmetric: With ``dynamic``: rows have a zero point too.
    """
    if not dynamic and scale is None:
        return x
    codes, row_scale, row_zero = quantize_rows_reference(x.reshape(-1, x.shape[-1]), scale, asymmetric)
    return ((codes.to(row_scale.dtype) - row_zero) * row_scale).to(x.dtype).view(x.shape)


def quantize_rows_reference(x: Tensor, scale: Tensor | None, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """See ``hfquant.kernels.quantize_rows.quantize_rows``."""
    zero_point = torch.zeros(*x.shape[:-1], 1, dtype=torch.int8, device=x.device)
    if scale is not None:
        nan = torch.full_like(scale, torch.nan)
        row_scale = torch.where(x.isnan().any(-1, keepdim=True), nan, scale)
    elif asymmetric:
        row_scale, zero_point = choose_row_scale_and_zero_point(x)
    else:
        row_scale = choose_row_scale(x)
    steps = torch.round(x.float() / row_scale).add_(zero_point).nan_to_num_(nan=0.0)
    return steps.clamp_(*code_range(8)).to(torch.int8), row_scale, zero_point

"""Plain torch for ``quantize_rows``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import choose_row_scale, choose_row_scale_and_zero_point, code_range


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

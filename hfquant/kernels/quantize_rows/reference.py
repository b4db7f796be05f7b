"""Plain torch for ``quantize_rows``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import choose_row_scale, code_range


def quantize_rows_reference(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``hfquant.kernels.quantize_rows.quantize_rows``."""
    if scale is None:
        row_scale = choose_row_scale(x)
    else:
        nan = torch.full_like(scale, torch.nan)
        row_scale = torch.where(x.isnan().any(-1, keepdim=True), nan, scale)
    steps = torch.round(x.float() / row_scale).nan_to_num_(nan=0.0)
    return steps.clamp_(*code_range(8)).to(torch.int8), row_scale

"""Plain torch for ``dequantize``."""

import torch
from torch import Tensor

from hfquant.numerics.affine import dequantize, scale_from_bits, split_groups
from hfquant.numerics.packing import unpack


def dequantize_reference(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """See ``hfquant.kernels.dequantize.dequantize_weight``."""
    groups = weight_scale.shape[-1]
    if weight.numel() == 0:
        return weight.new_empty((*weight.shape[:-1], in_features), dtype=dtype)
    codes = split_groups(unpack(weight, bits=bits, length=in_features), in_features // groups)
    shift = None if zero_point is None else unpack(zero_point, bits=bits, length=groups).unsqueeze(-1)
    return dequantize(codes, scale_from_bits(weight_scale).unsqueeze(-1), shift, dtype=dtype).flatten(-2)

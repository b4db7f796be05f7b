"""Plain torch for ``quant_embedding``."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from hfquant.kernels.dequantize.reference import dequantize_reference


def quant_embedding_reference(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """See ``hfquant.kernels.quant_embedding.quant_embedding``."""
    rows = embedding(ids, weight)
    shift = None if zero_point is None else embedding(ids, zero_point)
    return dequantize_reference(rows, embedding(ids, weight_scale), shift, bits, embedding_dim, dtype)

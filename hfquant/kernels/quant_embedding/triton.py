"""Embedding lookup in Triton: the dequantization kernel on the rows that are asked for."""

import torch
from torch import Tensor

from hfquant.kernels.dequantize.triton import dequantize_rows
from hfquant.numerics.packing import PackedWeight


def quant_embedding_triton(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """See ``hfquant.kernels.quant_embedding.quant_embedding``."""
    out = weight.new_empty((*ids.shape, embedding_dim), dtype=dtype)
    return dequantize_rows(ids.contiguous(), PackedWeight(weight, weight_scale, zero_point), out, bits)

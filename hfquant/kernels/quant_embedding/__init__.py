"""Rows of a packed embedding table."""

import torch
from torch import Tensor

from hfquant.kernels.dispatch import define_op, register_triton
from hfquant.kernels.quant_embedding.reference import quant_embedding_reference


def _fake(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty((*ids.shape, embedding_dim), dtype=dtype)


define_op(
    "quant_embedding(Tensor ids, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, int bits, "
    "int embedding_dim, ScalarType dtype) -> Tensor",
    reference=quant_embedding_reference,
    fake=_fake,
)
register_triton("quant_embedding")


def quant_embedding(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    *,
    bits: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``ids`` of a packed table, dequantized.

    Args:
        ids: Row numbers, any shape, int64 or int32.
        weight: Packed codes ``[V, W]``, int32.
        weight_scale: Bit patterns of the bfloat16 scales ``[V, K // G]``, int16.
        weight_zero_point: Packed zero points ``[V, ceil(K // G * bits / 32)]``, int32, or ``None``.
        bits: Bits per code, 4 or 8.
        embedding_dim: K.
        dtype: Of the result.

    Returns:
        Embeddings ``[*ids.shape, K]``.

    Raises:
        IndexError: If an id is not a row of the table; on a GPU, where that cannot raise, its row is NaN.
    """
    out: Tensor = torch.ops.hfquant.quant_embedding(
        ids, weight, weight_scale, weight_zero_point, bits, embedding_dim, dtype
    )
    return out

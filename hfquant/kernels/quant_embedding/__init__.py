"""Rows of a packed embedding table."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native, register_triton
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


def _fits_native(ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> bool:
    whole = all(tensor is None or tensor.is_contiguous() for tensor in (ids, weight, scale, zero))
    return whole and ids.dtype == torch.int64 and rest[-1] in native.FLOATS


def _is_native(ids: Tensor, weight: Tensor, *rest: Any) -> bool:
    known = _fits_native(ids, weight, *rest)
    # An id outside the table is left to the reference, which raises torch's own IndexError.
    return known and (not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) < weight.shape[0]))


define_op(
    "quant_embedding(Tensor ids, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, int bits, "
    "int embedding_dim, ScalarType dtype) -> Tensor",
    reference=quant_embedding_reference,
    fake=_fake,
)
register_native("quant_embedding", _is_native)
register_triton("quant_embedding")

_NATIVE: Any = torch.ops.hfquant.quant_embedding_cpu.default


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
        IndexError: If an id is not a row of the table; on a GPU, where that cannot raise, its row is NaN. A compiled
            model raises ``RuntimeError``.
    """
    arguments = (ids, weight, weight_scale, weight_zero_point, bits, embedding_dim, dtype)
    if ids.is_cpu and native.is_active() and not torch.compiler.is_compiling():
        try:
            direct: Tensor = _NATIVE(*arguments)
            return direct
        except RuntimeError:  # an id that is no row, or a layout for the reference: it says so, or computes it
            pass
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    fits = traced and ids.is_cpu and native.is_active() and _fits_native(*arguments)
    out: Tensor = (_NATIVE if fits else torch.ops.hfquant.quant_embedding)(*arguments)
    return out

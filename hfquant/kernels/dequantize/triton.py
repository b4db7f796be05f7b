"""Dequantization in Triton: bit for bit the reference's values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.grid.triton import load_zero_point, unpack_words
from hfquant.numerics.packing import PackedWeight


ROWS, WORDS = 2, 512
"""Rows and words of one program: 8192 INT4 weights, measured on an H200."""


@triton.jit
def dequantize_kernel(
    ids_ptr, w_ptr, s_ptr, z_ptr, out_ptr, ROWS_OUT, ROWS_IN, K, WIDTH, GROUPS, ZERO_WORDS,
    BITS: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``BR`` rows times ``BW`` words; rows are those of ``ids`` where given, and NaN where an id is not a row."""
    PER: tl.constexpr = 32 // BITS
    out_row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    row, known = out_row, out_row < ROWS_OUT
    if ids_ptr is not None:
        row = tl.load(ids_ptr + out_row, mask=known, other=0).to(tl.int64)
        known = known & (row >= 0) & (row < ROWS_IN)
    words = tl.load(
        w_ptr + row[:, None] * WIDTH + word[None, :], mask=known[:, None] & (word < WIDTH)[None, :], other=0
    )
    codes = unpack_words(words, BITS).to(tl.float32)
    column = word[:, None] * PER + tl.arange(0, PER)[None, :]
    if GROUP % PER == 0:
        group = (word * PER // GROUP)[None, :, None]  # one scale for all codes of a word
    else:
        group = (column // GROUP)[None, :, :]
    in_row = known[:, None, None] & (group < GROUPS)
    scale = tl.load(s_ptr + row[:, None, None] * GROUPS + group, mask=in_row, other=0).to(tl.float32)
    if z_ptr is not None:
        codes -= load_zero_point(z_ptr + row[:, None, None] * ZERO_WORDS, group, in_row, BITS)
    values = tl.where(known[:, None, None], codes * scale, float("nan"))
    mask = (out_row < ROWS_OUT)[:, None, None] & (column < K)[None, :, :]
    out = out_ptr + out_row[:, None, None] * K + column[None, :, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_triton(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """See ``hfquant.kernels.dequantize.dequantize_weight``."""
    out = weight.new_empty((*weight.shape[:-1], in_features), dtype=dtype)
    return dequantize_rows(None, PackedWeight(weight, weight_scale, zero_point), out, bits)


def dequantize_rows(ids: Tensor | None, packed: PackedWeight, out: Tensor, bits: int) -> Tensor:
    """Fill ``out [..., K]`` with the rows ``ids`` of a packed matrix, or with all of its rows."""
    weight, weight_scale, zero_point = (None if tensor is None else tensor.contiguous() for tensor in packed)
    assert weight is not None
    assert weight_scale is not None
    k, groups, width = out.shape[-1], weight_scale.shape[-1], weight.shape[-1]
    if out.numel() == 0:
        return out
    rows = out.numel() // k
    words = min(WORDS, triton.next_power_of_2(width))
    with torch.cuda.device_of(weight):
        dequantize_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, words))](
            ids, weight, weight_scale.view(torch.bfloat16), zero_point, out, rows, weight.numel() // width, k, width,
            groups, 0 if zero_point is None else zero_point.shape[-1], BITS=bits, GROUP=k // groups, BR=ROWS, BW=words,
        )  # fmt: skip
    return out

"""The INT4 linear layer in Triton; the INT8 one differs only in how integer activations meet integer weights."""

import torch
from torch import Tensor

from hfquant.kernels.dequantize.triton import dequantize_triton
from hfquant.kernels.grid.triton import rows_of
from hfquant.kernels.packed_matmul.triton import fits_groups, packed_matmul
from hfquant.kernels.quantize_rows.triton import quantize_rows_triton
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.packing import PackedWeight


FUSED_ROWS = 64
"""Rows up to which one kernel reads packed weights; beyond, dequantizing once and cuBLAS are expected to be faster.

A model of the two (docs/gpu-kernels.md), not a measurement: ``benchmarks/gpu.py crossover`` measures it.
"""


def int4_linear_triton(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
) -> Tensor:
    """See ``hfquant.kernels.int4_linear.int4_linear``."""
    rows, packed = rows_of(x), PackedWeight(weight, weight_scale, zero_point)
    codes = row_scale = None
    if dynamic or input_scale is not None:
        codes, row_scale = quantize_activations(rows, input_scale)
    out = float_matmul(rows, codes, row_scale, packed, bias, bits=4)
    return out.view(*x.shape[:-1], weight.shape[0])


def quantize_activations(rows: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """INT8 codes ``[M, K]`` and scales ``[M, 1]`` of activations, static where ``input_scale`` is given."""
    return quantize_rows_triton(rows, None if input_scale is None else scale_from_bits(input_scale))


def float_matmul(
    rows: Tensor,
    codes: Tensor | None,
    row_scale: Tensor | None,
    packed: PackedWeight,
    bias: Tensor | None,
    *,
    bits: int,
) -> Tensor:
    """Product of activations, or of their ``codes * row_scale``, with packed weights, in floating point."""
    (m, k), groups, dtype = rows.shape, packed.weight_scale.shape[-1], rows.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    if half and m <= FUSED_ROWS and fits_groups(k, groups, bits):
        values = rows if codes is None else codes.to(dtype)  # integers up to 128 are exact
        return packed_matmul(values, packed, bits=bits, bias=bias, row_scale=row_scale)
    if codes is not None and row_scale is not None:
        rows = (codes * row_scale).to(dtype)
    weight = dequantize_triton(*packed, bits, k, dtype)
    return torch.nn.functional.linear(rows, weight, bias)

"""The INT4 linear layer in Triton; the INT8 one differs only in how integer activations meet integer weights."""

from typing import NamedTuple

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

At 64 rows it was measured to pay, beyond it is a model of the two (docs/gpu-kernels.md).
"""


def int4_linear_triton(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    asymmetric: bool,
    precision: int = 0,
) -> Tensor:
    """See ``hfquant.kernels.int4_linear.int4_linear``."""
    rows, packed = rows_of(x), PackedWeight(weight, weight_scale, zero_point)
    activations = None
    if dynamic or input_scale is not None:
        activations = quantize_activations(rows, input_scale, asymmetric)
    out = float_matmul(rows, activations, packed, bias, bits=4)
    return out.view(*x.shape[:-1], weight.shape[0])


class QuantizedRows(NamedTuple):
    """INT8 codes ``[M, K]`` of activations, scales ``[M, 1]`` (float32) and zero points ``[M, 1]`` or ``None``."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def steps(self, dtype: torch.dtype) -> Tensor:
        """Codes less zero points, in ``dtype``: integers up to 255, exact in every floating dtype."""
        codes = self.codes if self.zero_point is None else self.codes.to(torch.int16) - self.zero_point
        return codes.to(dtype)


def quantize_activations(rows: Tensor, input_scale: Tensor | None, asymmetric: bool) -> QuantizedRows:
    """INT8 activations, static where ``input_scale`` is given."""
    fixed = None if input_scale is None else scale_from_bits(input_scale)
    codes, scale, zero_point = quantize_rows_triton(rows, fixed, asymmetric)
    return QuantizedRows(codes, scale, zero_point if asymmetric and fixed is None else None)


def float_matmul(
    rows: Tensor,
    activations: QuantizedRows | None,
    packed: PackedWeight,
    bias: Tensor | None,
    *,
    bits: int,
) -> Tensor:
    """Product of ``rows``, or of what they are quantized to, with packed weights, in floating point."""
    (m, k), groups, dtype = rows.shape, packed.weight_scale.shape[-1], rows.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    if half and m <= FUSED_ROWS and fits_groups(k, groups, bits):
        if activations is None:
            return packed_matmul(rows, packed, bits=bits, bias=bias)
        return packed_matmul(activations.steps(dtype), packed, bits=bits, bias=bias, row_scale=activations.scale)
    if activations is not None:
        rows = (activations.steps(torch.float32) * activations.scale).to(dtype)
    weight = dequantize_triton(*packed, bits, k, dtype)
    return torch.nn.functional.linear(rows, weight, bias)

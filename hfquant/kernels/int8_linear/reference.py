"""Plain torch for ``int8_linear``."""

from torch import Tensor
from torch.nn.functional import linear

from hfquant.kernels.dequantize.reference import dequantize_reference
from hfquant.kernels.integer_matmul import integer_matmul
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.packing import unpack


def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
) -> Tensor:
    """See ``hfquant.kernels.int8_linear.int8_linear``."""
    return quant_linear_reference(x, weight, weight_scale, zero_point, input_scale, bias, dynamic, bits=8)


def quant_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    *,
    bits: int,
) -> Tensor:
    """The formula of both linears; ``bits`` only says how codes are packed."""
    if not dynamic and input_scale is None:
        return linear(x, dequantize_reference(weight, weight_scale, zero_point, bits, x.shape[-1], x.dtype), bias)
    rows = x.reshape(-1, x.shape[-1])
    codes, row_scale = quantize_rows_reference(rows, None if input_scale is None else scale_from_bits(input_scale))
    if weight_scale.shape[-1] == 1 and zero_point is None:
        product = integer_matmul(codes, unpack(weight, bits=bits, length=x.shape[-1]))
        out = product * scale_from_bits(weight_scale).flatten() * row_scale
    else:
        # Groups have scales of their own: sum codes times weights in float32, where each product is exact.
        values = dequantize_reference(weight, weight_scale, zero_point, bits, x.shape[-1], row_scale.dtype)
        out = linear(codes.to(row_scale.dtype), values) * row_scale
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

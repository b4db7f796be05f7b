"""Plain torch for ``int8_linear``."""

from torch import Tensor
from torch.nn.functional import linear

from hfquant.kernels.integer_matmul import integer_matmul
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.packing import unpack
from hfquant.numerics.straight_through import row_values


def int8_linear_reference(
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
    """See ``hfquant.kernels.int8_linear.int8_linear``."""
    return quant_linear_reference(x, weight, weight_scale, zero_point, input_scale, bias, dynamic, asymmetric, bits=8)


def quant_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    asymmetric: bool,
    *,
    bits: int,
) -> Tensor:
    """The formula of both linears; ``bits`` only says how codes are packed."""
    groups = weight_scale.shape[-1]
    return linear_on_codes(
        x,
        unpack(weight, bits=bits, length=x.shape[-1]),
        scale_from_bits(weight_scale),
        None if zero_point is None else unpack(zero_point, bits=bits, length=groups),
        None if input_scale is None else scale_from_bits(input_scale),
        bias,
        dynamic,
        asymmetric,
    )


def linear_on_codes(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    asymmetric: bool = False,
) -> Tensor:
    """The same on codes ``[N, K]`` (int8) and scales ``[N, K // G]`` (float32) that are not packed.

    Training computes with it, so that what was trained is what is deployed, bit for bit.
    """
    if not dynamic and input_scale is None:
        return linear(x, row_values(codes, scale, zero_point, dtype=x.dtype), bias)
    rows = x.reshape(-1, x.shape[-1])
    x_codes, row_scale, row_zero = quantize_rows_reference(rows, input_scale, asymmetric)
    if scale.shape[-1] == 1 and zero_point is None:
        product = integer_matmul(x_codes, codes, row_zero if asymmetric else None)
        out = product * scale.flatten() * row_scale
    else:
        # Groups have scales of their own: sum codes times weights in float32, where each product is exact.
        values = row_values(codes, scale, zero_point, dtype=row_scale.dtype)
        out = linear(x_codes.to(row_scale.dtype) - row_zero, values) * row_scale
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], codes.shape[0])

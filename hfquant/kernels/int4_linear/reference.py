"""Plain torch for ``int4_linear``."""

from torch import Tensor

from hfquant.kernels.int8_linear.reference import quant_linear_reference


def int4_linear_reference(
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
    return quant_linear_reference(x, weight, weight_scale, zero_point, input_scale, bias, dynamic, asymmetric, bits=4)

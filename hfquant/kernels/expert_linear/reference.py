"""Plain torch for ``expert_linear``: one linear op after the other."""

from collections.abc import Iterator

from torch import Tensor

from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.int4_linear import int4_linear
from hfquant.kernels.int8_linear import int8_linear


def expert_spans(expert_ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for expert, end in enumerate(expert_ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def expert_linear_reference(
    x: Tensor,
    expert_ends: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
) -> Tensor:
    """See ``hfquant.kernels.expert_linear.expert_linear``."""
    linear = int4_linear if bits == 4 else int8_linear
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    for expert, rows in expert_spans(expert_ends):
        packed = weight[expert], weight_scale[expert], None if zero_point is None else zero_point[expert]
        own = None if bias is None else bias[expert]
        out[rows] = linear(x[rows], *packed, input_scale=input_scale, bias=own, dynamic=dynamic, asymmetric=asymmetric)
    return out


def expert_linear_backward_reference(
    grad: Tensor,
    expert_ends: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    """Gradient of ``x``: ``grad @ dequantize(weight[e])`` for the rows of each expert e, straight through rounding."""
    grad_x = grad.new_zeros((grad.shape[0], in_features))
    for expert, rows in expert_spans(expert_ends):
        packed = weight[expert], weight_scale[expert], None if zero_point is None else zero_point[expert]
        grad_x[rows] = grad[rows] @ dequantize_weight(*packed, bits=bits, in_features=in_features, dtype=grad.dtype)
    return grad_x

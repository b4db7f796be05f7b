"""``x @ weight.T + bias`` on a packed INT8 weight."""

import torch
from torch import Tensor

from hfquant.kernels.int8_linear.reference import int8_linear_reference
from hfquant.kernels.linear_op import define_linear


define_linear("int8_linear", int8_linear_reference, bits=8)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dynamic: bool = False,
) -> Tensor:
    """Linear layer on INT8 weights; see ``hfquant.kernels.linear_op`` for arguments, result and gradient."""
    out: Tensor = torch.ops.hfquant.int8_linear(x, weight, weight_scale, weight_zero_point, input_scale, bias, dynamic)
    return out

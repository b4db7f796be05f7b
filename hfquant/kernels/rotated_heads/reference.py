"""Plain torch for ``rotated_heads``."""

from typing import Any

from torch import Tensor

from hfquant.kernels.layers import layer_reference
from hfquant.kernels.rotary.reference import rotary_reference


def rotated_heads_reference(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See ``hfquant.kernels.rotated_heads``."""
    *tensors, cos, sin, layouts, size = arguments
    q, k, v = (
        layer_reference(x, tuple(tensors), layouts, index).unflatten(-1, (-1, size)).transpose(1, 2)
        for index in range(3)
    )
    return *rotary_reference(q, k, cos, sin), v

"""Plain torch for ``activated_linear``."""

from typing import Any

from torch import Tensor

from hfquant.kernels.gated_product.reference import gate_reference
from hfquant.kernels.layers import layer_reference


def activated_linear_reference(x: Tensor, *arguments: Any) -> Tensor:
    """See ``hfquant.kernels.activated_linear``."""
    *tensors, layouts, kind = arguments
    return gate_reference(layer_reference(x, tuple(tensors), layouts, 0), kind)

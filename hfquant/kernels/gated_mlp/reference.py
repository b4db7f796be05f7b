"""Plain torch for ``gated_mlp``."""

from typing import Any

from torch import Tensor

from hfquant.kernels.gated_product.reference import gated_product_reference
from hfquant.kernels.layers import layer_reference


def gated_mlp_reference(x: Tensor, *arguments: Any) -> Tensor:
    """See ``hfquant.kernels.gated_mlp``."""
    *tensors, layouts, kind = arguments
    gate, up = (layer_reference(x, tuple(tensors), layouts, index) for index in (0, 1))
    return layer_reference(gated_product_reference(gate, up, kind), tuple(tensors), layouts, 2)

"""Plain torch for ``gated_mlp``."""

from typing import Any

from torch import Tensor

from hfquant.kernels.gated_product.reference import gated_product_reference
from hfquant.kernels.int8_linear.reference import quant_linear_reference


LAYER = 5
"""Tensors of a layer: weight, scales, zero points, input scale, bias."""


def gated_mlp_reference(x: Tensor, *arguments: Any) -> Tensor:
    """See ``hfquant.kernels.gated_mlp``."""
    *tensors, layouts, kind = arguments

    def layer(inputs: Tensor, index: int) -> Tensor:
        layout, parts = layouts >> 8 * index, tensors[index * LAYER : (index + 1) * LAYER]
        dynamic, asymmetric = bool(layout & 2), bool(layout & 4)
        return quant_linear_reference(inputs, *parts, dynamic, asymmetric, bits=4 if layout & 1 else 8)

    return layer(gated_product_reference(layer(x, 0), layer(x, 1), kind), 2)

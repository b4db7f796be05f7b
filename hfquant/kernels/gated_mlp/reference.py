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
        layout = layouts >> 8 * index
        weight, scale, zero, given, bias = tensors[index * LAYER : (index + 1) * LAYER]
        dynamic, asymmetric, bits = bool(layout & 2), bool(layout & 4), 4 if layout & 1 else 8
        return quant_linear_reference(inputs, weight, scale, zero, given, bias, dynamic, asymmetric, bits=bits)

    return layer(gated_product_reference(layer(x, 0), layer(x, 1), kind), 2)

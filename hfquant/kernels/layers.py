"""Packed linear layers as arguments of ops that compute several of them.

A layer is five tensors (weight, scales, zero points, input scale and bias, see ``linear_op``) and a byte of
``layouts``, an integer with the bytes of all layers.
"""

from typing import Any

from torch import Tensor

from hfquant.kernels.int8_linear.reference import quant_linear_reference


LAYER_TENSORS = 5


def layer_schema(name: str) -> str:
    """The five tensors of a layer in the schema of an op."""
    optional = (f"Tensor? {name}_{suffix}" for suffix in ("zero_point", "input_scale", "bias"))
    return ", ".join((f"Tensor {name}", f"Tensor {name}_scale", *optional))


PRECISION = sum(8 << 8 * index for index in range(3))
"""What each step of ``native.float32_precision()`` adds to ``layouts``."""


def layout_of(bits: int, *, dynamic: bool, asymmetric: bool) -> int:
    """How a layer is quantized, in a byte."""
    return (bits == 4) | dynamic << 1 | (dynamic and asymmetric) << 2


def layer_reference(x: Tensor, tensors: tuple[Any, ...], layouts: int, index: int) -> Tensor:
    """What layer ``index`` makes of ``x``, in plain torch."""
    layout = layouts >> 8 * index
    weight, scale, zero, given, bias = tensors[index * LAYER_TENSORS : (index + 1) * LAYER_TENSORS]
    dynamic, asymmetric, bits = bool(layout & 2), bool(layout & 4), 4 if layout & 1 else 8
    return quant_linear_reference(x, weight, scale, zero, given, bias, dynamic, asymmetric, bits=bits)

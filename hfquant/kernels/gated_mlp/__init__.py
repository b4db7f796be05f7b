"""``down(act(gate(x)) * up(x))`` on packed weights in one call; for inference, it has no gradient.

Arguments: ``x [..., K]``; weight, scales, zero points, input scale and bias (see ``linear_op``) of the layers gate, up
and down; ``layouts``, a byte for each layer made by ``layout_of``; and an index into ``GATES`` of ``gated_product``.
"""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native
from hfquant.kernels.gated_mlp.reference import gated_mlp_reference


def _layer(name: str) -> str:
    optional = (f"Tensor? {name}_{suffix}" for suffix in ("zero_point", "input_scale", "bias"))
    return ", ".join((f"Tensor {name}", f"Tensor {name}_scale", *optional))


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[10].shape[0]))


def layout_of(bits: int, *, dynamic: bool, asymmetric: bool) -> int:
    """How a layer is quantized, in a byte."""
    return (bits == 4) | dynamic << 1 | (dynamic and asymmetric) << 2


define_op(
    f"gated_mlp(Tensor x, {_layer('gate')}, {_layer('up')}, {_layer('down')}, int layouts, int kind) -> Tensor",
    reference=gated_mlp_reference,
    fake=_fake,
)
register_native("gated_mlp", lambda x, *_: x.dtype in native.FLOATS)

NATIVE: Any = torch.ops.hfquant.gated_mlp_cpu.default
"""The native op; it raises ``RuntimeError`` at layouts that are not for it."""

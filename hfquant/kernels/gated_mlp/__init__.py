"""``down(act(gate(x)) * up(x))`` on packed weights in one call; for inference, it has no gradient.

Arguments: ``x [..., K]``; the layers gate, up and down (see ``hfquant.kernels.layers``); ``layouts``; and an index into
``GATES`` of ``gated_product``.
"""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native
from hfquant.kernels.gated_mlp.reference import gated_mlp_reference
from hfquant.kernels.layers import layer_schema


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[10].shape[0]))


_LAYERS = ", ".join(map(layer_schema, ("gate", "up", "down")))

define_op(f"gated_mlp(Tensor x, {_LAYERS}, int layouts, int kind) -> Tensor", reference=gated_mlp_reference, fake=_fake)
register_native("gated_mlp", lambda x, *_: x.dtype in native.FLOATS)

NATIVE: Any = torch.ops.hfquant.gated_mlp_cpu.default
"""The native op; it raises ``RuntimeError`` at layouts that are not for it."""

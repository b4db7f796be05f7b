"""``act(linear(x))`` on packed weights in one call; for inference, it has no gradient.

Arguments: ``x [..., K]``; the layer (see ``hfquant.kernels.layers``); ``layouts``; and an index into ``GATES`` of
``gated_product``.
"""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.activated_linear.reference import activated_linear_reference
from hfquant.kernels.dispatch import define_op, register_native
from hfquant.kernels.layers import layer_schema


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[0].shape[0]))


define_op(
    f"activated_linear(Tensor x, {layer_schema('up')}, int layouts, int kind) -> Tensor",
    reference=activated_linear_reference,
    fake=_fake,
)
register_native("activated_linear", lambda x, *_: x.dtype in native.FLOATS)

NATIVE: Any = torch.ops.hfquant.activated_linear_cpu.default
"""The native op; it raises ``RuntimeError`` at layouts that are not for it."""

"""Queries, keys and values of attention on packed weights in one call, with rotary embedding; it has no gradient.

Arguments: ``x [B, T, K]``; the layers q, k and v (see ``hfquant.kernels.layers``); cosines and sines of ``rotary``,
``[B or 1, T, D]``; ``layouts``; and the size ``D`` of a head. Returns queries ``[B, H, T, D]``, keys and values
``[B, H', T, D]``, the same bits as the layers and ``rotary`` give.
"""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native
from hfquant.kernels.layers import LAYER_TENSORS, layer_schema
from hfquant.kernels.rotated_heads.reference import rotated_heads_reference


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    size, (batch, tokens, _) = arguments[-1], x.shape
    widths = (arguments[index * LAYER_TENSORS].shape[0] for index in range(3))
    q, k, v = (x.new_empty(batch, tokens, width // size, size).transpose(1, 2) for width in widths)
    return q, k, v


_LAYERS = ", ".join(map(layer_schema, "qkv"))

define_op(
    f"rotated_heads(Tensor x, {_LAYERS}, Tensor cos, Tensor sin, int layouts, int size) -> (Tensor, Tensor, Tensor)",
    reference=rotated_heads_reference,
    fake=_fake,
)
register_native("rotated_heads", lambda x, *_: x.dtype in native.FLOATS)

NATIVE: Any = torch.ops.hfquant.rotated_heads_cpu.default
"""The native op; it raises ``RuntimeError`` at what is not for it."""

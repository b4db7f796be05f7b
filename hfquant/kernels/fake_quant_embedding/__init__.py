"""The embedding table of quantization-aware training."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels.dispatch import define_op, register_autograd
from hfquant.kernels.fake_quant_embedding.reference import (
    fake_quant_embedding_backward_reference,
    fake_quant_embedding_reference,
)
from hfquant.kernels.fake_quant_linear import GridWeight


def _fake(ids: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=rest[-1])


def _fake_backward(grad: Tensor, ids: Tensor, weight: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(weight.shape), scale.new_empty(scale.shape, dtype=wide)


define_op(
    "fake_quant_embedding(Tensor ids, Tensor weight, Tensor log_scale, Tensor scale, Tensor? zero_point, "
    "int padding_idx, int bits, float blend, ScalarType dtype) -> Tensor",
    reference=fake_quant_embedding_reference,
    fake=_fake,
)
define_op(
    "fake_quant_embedding_backward(Tensor grad, Tensor ids, Tensor weight, Tensor scale, Tensor? zero_point, "
    "int padding_idx, int bits, float blend) -> (Tensor, Tensor)",
    reference=fake_quant_embedding_backward_reference,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, log_scale, scale, zero_point, *rest, _ = inputs
    ctx.save_for_backward(ids, weight, scale, zero_point)
    ctx.arguments, ctx.scale_dtype = rest, log_scale.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, scale = torch.ops.hfquant.fake_quant_embedding_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    wanted = ctx.needs_input_grad
    gradients = (table if wanted[1] else None, scale.to(ctx.scale_dtype) if wanted[2] else None)
    return None, *gradients, None, None, None, None, None, None


register_autograd("fake_quant_embedding", _backward, _setup_context)


def fake_quant_embedding(
    ids: Tensor,
    grid: GridWeight,
    *,
    bits: int,
    dtype: torch.dtype,
    padding_idx: int | None = None,
    blend: float = 1.0,
) -> Tensor:
    """What ``quant_embedding`` will look up in the codes of ``grid``, bit for bit, with gradients.

    Args:
        ids: Row numbers, any shape, int64 or int32.
        grid: The table ``[V, K]`` and its scales; only the rows that are asked for are quantized.
        bits: Bits per code.
        dtype: Of the result.
        padding_idx: Row that gets no gradient.
        blend: Share of quantization, as for ``fake_quant_linear``.

    Returns:
        Embeddings ``[*ids.shape, K]`` in ``dtype``.
    """
    padding = -1 if padding_idx is None else padding_idx
    out: Tensor = torch.ops.hfquant.fake_quant_embedding(ids, *grid[:4], padding, bits, blend, dtype)
    return out

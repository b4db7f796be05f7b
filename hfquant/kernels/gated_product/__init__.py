"""Activations of feed-forward blocks, and gates (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_autograd, register_native
from hfquant.kernels.gated_product.reference import (
    gate_backward_reference,
    gate_reference,
    gated_product_reference,
)


GATES = ("silu", "gelu_tanh", "gelu")
"""Activations by the number that the op takes."""


def _fake(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    grad_gate = gate_backward_reference(grad if up is None else grad * up, gate, ctx.kind)
    return grad_gate, None if up is None else grad * gate_reference(gate, ctx.kind), None


def _is_native(gate: Tensor, up: Tensor | None, *_: Any) -> bool:
    alike = up is None or (gate.dtype == up.dtype and gate.shape == up.shape and up.is_contiguous())
    return alike and gate.dtype in native.FLOATS and gate.is_contiguous()


define_op(
    "gated_product(Tensor gate, Tensor? up, int kind) -> Tensor",
    reference=lambda *arguments: gated_product_reference(*arguments).contiguous(),
    fake=_fake,
)
register_autograd("gated_product", _backward, _setup_context)
register_native("gated_product", _is_native)

_NATIVE: Any = torch.ops.hfquant.gated_product_cpu.default


def gated_product(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    """``act(gate) * up``, each rounded to their dtype.

    Args:
        gate: Any shape.
        up: Like ``gate``; ``None`` for ``act(gate)`` alone.
        kind: Index into ``GATES``.
    """
    trains = torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad))
    fits = not trains and gate.is_cpu and native.is_active() and _is_native(gate, up)
    out: Tensor = (_NATIVE if fits else torch.ops.hfquant.gated_product)(gate, up, kind)
    return out

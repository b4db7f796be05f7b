"""Softmax attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1), with grouped keys."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.attention.reference import attention_backward_reference, attention_reference
from hfquant.kernels.dispatch import define_op, register_autograd, register_native


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return q.new_empty(q.size(0), q.size(2), q.size(1), v.size(3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, mask)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, mask = ctx.saved_tensors
    return *attention_backward_reference(grad, q, k, v, mask, ctx.scale, ctx.causal), None, None, None


def fits_native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float = 1.0, causal: bool = False) -> bool:
    """Whether the native kernel takes these arguments of ``attention``."""
    if not (q.dim() == k.dim() == v.dim() == 4 and q.is_cpu and native.is_active() and q.dtype in native.FLOATS):
        return False
    batch, heads, tokens, size = q.shape
    key_heads, keys = k.size(1), k.size(2)
    return (
        q.dtype == k.dtype == v.dtype
        and k.size(0) == v.size(0) == batch
        and v.size(1) == key_heads > 0
        and heads % key_heads == 0
        and v.size(2) == keys
        and k.size(3) == size > 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and (mask is None or (not causal and _mask_fits(mask, q.dtype, (batch, heads, tokens), keys)))
    )


def _mask_fits(mask: Tensor, dtype: torch.dtype, shape: tuple[int, ...], keys: int) -> bool:
    return (
        mask.is_cpu
        and mask.dtype in (torch.bool, dtype)
        and mask.dim() == 4
        and mask.size(3) == keys
        and mask.stride(3) == 1
        and all(size in (1, wanted) for size, wanted in zip(mask.shape, shape, strict=False))
    )


define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor",
    reference=attention_reference,
    fake=_fake,
)
register_autograd("attention", _backward, _setup_context)
register_native("attention", fits_native)

NATIVE: Any = torch.ops.hfquant.attention_cpu.default
"""The native op without its check; it raises ``RuntimeError`` at what is not for it."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False) -> Tensor:
    """``softmax(q k^T * scale + mask) v``, computed in float32.

    Args:
        q: Queries ``[B, H, T, D]``.
        k: Keys ``[B, H', S, D]``; ``H`` is a multiple of ``H'``, and query head ``h`` reads key head ``h // (H / H')``.
        v: Values ``[B, H', S, E]``.
        mask: ``[B or 1, H or 1, T or 1, S]``: bool, true where a token sees a key, or added to the scores in the dtype
            of ``q``.
        scale: Factor of the scores.
        causal: Token ``t`` sees keys ``0 .. t`` only; not with a mask.

    Returns:
        ``[B, T, H, E]`` in the dtype of ``q``. Gradients are those of queries, keys and values.
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # An exported program has to run on machines without the native library.
    fits = not trains and not torch.compiler.is_exporting() and fits_native(q, k, v, mask, scale, causal)
    out: Tensor = (NATIVE if fits else torch.ops.hfquant.attention)(q, k, v, mask, scale, causal)
    return out

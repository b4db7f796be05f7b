"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), on halves of a head."""

from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native
from hfquant.kernels.rotary.reference import rotary_reference


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def fits_native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the native kernel takes these tensors."""
    if not (q.is_cpu and native.is_active() and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3):
        return False
    batch, tokens, size = q.size(0), q.size(2), q.size(3)
    return (
        q.dtype in native.FLOATS
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and k.size(0) == batch
        and k.size(2) == tokens
        and k.size(3) == size
        and size % 2 == 0
        and cos.shape == sin.shape
        and cos.size(0) in (1, batch)
        and cos.size(1) == tokens
        and cos.size(2) == size
        and q.stride(3) == k.stride(3) == 1
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


define_op(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", reference=rotary_reference, fake=_fake
)
register_native("rotary", fits_native)

NATIVE: Any = torch.ops.hfquant.rotary_cpu.default
"""``rotary`` without its check."""


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their tokens; bit for bit what the formula gives in torch.

    Args:
        q: Queries ``[B, H, T, D]``.
        k: Keys ``[B, H', T, D]``.
        cos: Cosines ``[B or 1, T, D]``, in the dtype of ``q``.
        sin: Sines, likewise.

    Returns:
        Queries and keys. No gradient.
    """
    chosen = NATIVE if fits_native(q, k, cos, sin) else torch.ops.hfquant.rotary
    turned: tuple[Tensor, Tensor] = chosen(q, k, cos, sin)
    return turned

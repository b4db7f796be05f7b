"""Larger operations between the packed layers of a Transformers model: those of ``nn/fused.py``, and attention.

Transformers looks its attention functions up by name. What is registered as ``sdpa`` is wrapped, once a quantized
model is there: modules marked by ``fuse_modules_`` run on the native kernel where that computes the same, and all
others as before.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hfquant.kernels import native
from hfquant.kernels.attention import attention, fits_native
from hfquant.nn.fused import ATTENDS, fuse_modules_


SDPA = "sdpa"
UNKNOWN = ("position_bias", "cache", "softcap", "output_attentions")
"""Arguments of attention functions that the kernel knows nothing of."""


def fuse_model_(model: nn.Module) -> None:
    """Let norms, gates, rotary embeddings and attention of ``model`` run as one op each."""
    fuse_modules_(model)
    known = AttentionInterface()
    if native.is_active() and known.get(SDPA) is sdpa_attention_forward:
        AttentionInterface.register(SDPA, _with_attention_op(sdpa_attention_forward))


def _with_attention_op(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if ATTENDS in module.__dict__ and not dropout and _runs(module, query, key, value, attention_mask, kwargs):
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            causal = query.size(2) > 1 and attention_mask is None and causal
            scale = query.size(3) ** -0.5 if scaling is None else scaling
            return attention(query, key, value, attention_mask, scale, causal=causal), None
        return function(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    return attention_forward


def _runs(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether the native kernel may stand in: not where autocast or an exported program see more."""
    return (
        fits_native(query, key, value, mask)
        and query.size(1) == key.size(1) * getattr(module, "num_key_value_groups", 1)
        and not (mask is not None and mask.requires_grad)
        and all(kwargs.get(name) is None or kwargs.get(name) is False for name in UNKNOWN)
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )

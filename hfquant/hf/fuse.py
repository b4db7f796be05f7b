"""Larger operations between the packed layers of a Transformers model: those of ``nn/fused.py``, and attention.

Transformers looks its attention functions up by name. What is registered as ``sdpa`` is wrapped, once a quantized
model is there: modules marked by ``fuse_modules_`` run on the native kernel where that computes the same, and all
others as before. Attention modules that, tried on random values, compute what Llama's do, get queries, keys and values
from one op.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfquant.kernels import native
from hfquant.kernels.attention import NATIVE as NATIVE_ATTENTION, attention, fits_native
from hfquant.kernels.attention.reference import attention_reference
from hfquant.kernels.rotary.reference import rotary_reference
from hfquant.kernels.rotated_heads import NATIVE as NATIVE_HEADS
from hfquant.nn.fused import (
    ATTENDS,
    FLOAT,
    SETTINGS,
    Fused,
    close,
    fuse_modules_,
    fused_class,
    packed_arguments,
    runs,
    set_class,
    stand_in,
)


SDPA = "sdpa"
UNKNOWN = ("position_bias", "cache", "softcap", "output_attentions")
"""Arguments of attention functions that the kernel knows nothing of."""

UNUSED = {"position_ids", "use_cache", "cache_position"}
"""Arguments that decoder layers give their attention, which Llama's makes no use of."""

ARGUMENTS = ["self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values"]
"""Those that come first in the forward of attention modules, for callers who do not name them."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class FusedAttention(Fused):
    """Attention with rotary embedding, with one op in place of three layers and the embedding."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the layer to ``hidden_states [B, T, K]``."""
        heads = None
        if position_embeddings is not None and not self.training and _is_ours(self, kwargs):
            heads = self._heads(hidden_states, *position_embeddings)
        if heads is None:
            return self.float_class.forward(
                self,
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        q, k, v = heads
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        output: Any = self._modules["o_proj"]
        out = self._attend(q, k, v, attention_mask)
        return output(out.reshape(*hidden_states.shape[:-1], -1)), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale, causal = self.scaling, mask is None and q.size(2) > 1 and getattr(self, "is_causal", True)
        if not torch.compiler.is_compiling():  # a compiled op cannot be tried
            try:
                out: Tensor = NATIVE_ATTENTION(q, k, v, mask, scale, causal)
                return out
            except RuntimeError:  # what the kernel does not take
                pass
        out, _ = ALL_ATTENTION_FUNCTIONS[SDPA](self, q, k, v, mask, dropout=0.0, scaling=scale)
        return out

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rotated queries and keys, and values; ``None`` where the op does not compute them."""
        size, layers = self.__dict__[SETTINGS][0], tuple(map(self._modules.get, PROJECTIONS[:3]))
        if not (runs(x, traced=True) and x.dim() == cos.dim() == 3 and cos.shape == sin.shape):
            return None
        fits = cos.size(0) in (1, x.size(0)) and cos.size(1) == x.size(1) and cos.size(2) == size
        fits = fits and cos.dtype == sin.dtype == x.dtype and cos.is_contiguous() and sin.is_contiguous()
        packed = packed_arguments(layers) if fits else None
        if packed is None or x.size(-1) != layers[0].in_features:  # type: ignore[union-attr]
            return None
        *tensors, layouts = packed
        try:
            heads: tuple[Tensor, Tensor, Tensor] = NATIVE_HEADS(x, *tensors, cos, sin, layouts, size)
        except RuntimeError:  # layouts that the kernels do not take
            return None
        return heads


def _is_ours(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``module`` would call the attention function that is wrapped here, and with nothing that we know not."""
    for name, value in kwargs.items():
        if name not in UNUSED and value is not None and (value is not False or name == "is_causal"):
            return False
    # The property of Transformers takes longer than some layers.
    chosen = module.config.__dict__.get("_attn_implementation_internal")
    return chosen == SDPA and hasattr(ALL_ATTENTION_FUNCTIONS[SDPA], SETTINGS)


def fuse_model_(model: nn.Module) -> None:
    """Let norms, gates, rotary embeddings and attention of ``model`` run as one op each."""
    fuse_modules_(model)
    if not native.is_active():
        return
    if ALL_ATTENTION_FUNCTIONS[SDPA] is sdpa_attention_forward:
        AttentionInterface.register(SDPA, _with_attention_op(sdpa_attention_forward))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            settings = None if isinstance(module, Fused) else _attention_settings(module)
            if settings is not None:
                module.__dict__[SETTINGS] = settings
                set_class(module, fused_class(FusedAttention, type(module)))


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

    setattr(attention_forward, SETTINGS, True)
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


class _Cache:
    """A cache with some tokens in it, which keeps what it is given."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.past, self.given = (k, v), ()

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, ...]:
        """All tokens of a layer."""
        self.given += (k, v, layer_idx)  # type: ignore[assignment]
        return tuple(torch.cat(pair, 2) for pair in zip(self.past, (k, v), strict=True))


def _attention_settings(module: nn.Module) -> tuple[int, float] | None:
    """Size of a head and scale of the scores, if ``module`` is attention as in Llama."""
    size, scale = module.__dict__.get("head_dim"), module.__dict__.get("scaling")
    layers: list[Any] = [module._modules.get(name) for name in PROJECTIONS]
    whole = ATTENDS in module.__dict__ and not module._parameters and hasattr(module, "config")
    whole = whole and hasattr(module, "layer_idx")
    whole = whole and list(inspect.signature(type(module).forward).parameters)[: len(ARGUMENTS)] == ARGUMENTS
    if not whole or not all(hasattr(layer, "out_features") for layer in layers):
        return None
    if not isinstance(size, int) or not isinstance(scale, float) or not isinstance(module.layer_idx, int):
        return None
    sizes = [layer.out_features for layer in layers[:3]]
    if sizes[1] != sizes[2] or any(width % size for width in sizes) or sizes[0] % sizes[1]:
        return None
    inner = 12
    shapes = [*((inner, width) for width in sizes), (sizes[0], inner)]
    linears = {name: nn.Linear(*shape, **FLOAT) for name, shape in zip(PROJECTIONS, shapes, strict=True)}
    other: Any = stand_in(module, {}, linears)
    other.config, other.training = copy.copy(module.config), False
    other.config._attn_implementation = SDPA
    return (size, scale) if all(_attends(other, linears, size, scale, cached=c) for c in (False, True)) else None


@torch.no_grad()
def _attends(module: Any, linears: dict[str, nn.Linear], size: int, scale: float, *, cached: bool) -> bool:
    """Whether ``module`` computes the formula on random values, whatever it is told about positions."""
    tokens, past = 5, 3
    x, cos, sin = torch.randn(2, tokens, 12, **FLOAT), *torch.randn(2, 2, tokens, size, **FLOAT)
    q, k, v = (linears[name](x).unflatten(-1, (-1, size)).transpose(1, 2) for name in PROJECTIONS[:3])
    q, k = rotary_reference(q, k, cos, sin)
    cache = _Cache(*torch.randn(2, 2, k.size(1), past, size, **FLOAT)) if cached else None
    mask = torch.ones(2, 1, tokens, tokens + past, dtype=torch.bool, device="cpu").tril(past) if cached else None
    positions = torch.arange(100_000, 100_000 + tokens)
    try:
        found = module.forward(
            hidden_states=x,
            position_embeddings=(cos, sin),
            attention_mask=mask,
            past_key_values=cache,
            position_ids=positions.expand(2, -1),
            use_cache=cached,
            cache_position=positions,
        )
    except Exception:  # whatever it needs that is not there, it is not what we look for
        return False
    if cache is not None:
        given: Any = cache.given
        same = len(given) == 3 and close(given[0], k) and close(given[1], v) and given[2] == module.layer_idx
        k, v = (torch.cat(pair, 2) for pair in zip(cache.past, (k, v), strict=True))
    out = attention_reference(q, k, v, mask, scale, not cached)
    known = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and found[1] is None
    return known and (cache is None or same) and close(found[0], linears["o_proj"](out.flatten(2)))

"""TRL's trainers on a model whose output head is packed.

TRL 1.16 computes the loss from the head's float weight, tile by tile, without making logits (``add_fused_lm_head``). A
packed head has no such weight; while that forward runs, TRL is shown one with the dequantized values. It is freed with
the graph of the step.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from hfquant.errors import ConfigError
from hfquant.nn.packed_module import PackedModule


NAME = "add_fused_lm_head"


def wrap_fused_head(module: ModuleType) -> None:
    """Wrap TRL's ``add_fused_lm_head``, here and where other modules have it from ``module`` already."""
    original = getattr(module, NAME, None)
    if original is None or hasattr(original, "by_hfquant"):
        return
    wrapped = _showing_float_heads(original)
    for name, other in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and getattr(other, "__dict__", {}).get(NAME) is original:
            setattr(other, NAME, wrapped)


def _showing_float_heads(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapped(model: Any, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        if isinstance(_base(model.get_output_embeddings()), PackedModule):
            model.forward = _with_float_head(model, model.forward)

    wrapped.by_hfquant = True  # type: ignore[attr-defined]
    return wrapped


def _with_float_head(model: Any, fused: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fused)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()
        if not fused_lm_head or not isinstance(_base(head), PackedModule):
            return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        if head is not _base(head):
            raise ConfigError(
                "TRL's trainers read the weight of the output head, and would not see an adapter on it; leave the head "
                "out of target_modules"
            )
        shown = SimpleNamespace(weight=head.dequantize(), bias=head.bias)
        model.get_output_embeddings = lambda: shown
        try:
            return fused(*args, fused_lm_head=True, **kwargs)
        finally:
            del model.get_output_embeddings

    return forward


def _base(head: Any) -> Any:
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head

"""``prepare_model_for_finetuning`` and ``merge_adapters``: quantized models to fine-tuning and back, in place."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from hfquant.errors import ConfigError
from hfquant.hf.config import check_choice


ADAPTERS = ("grid", "scales", "side")

Model = TypeVar("Model", bound=nn.Module)


def prepare_model_for_finetuning(
    model: Model,
    adapter: str = "grid",
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> Any:
    """Let a quantized model train, with its weights packed all the time.

    Args:
        model: Quantized by hfquant, with packed layers.
        adapter: ``"grid"`` trains low-rank changes inside the rounding, and scales: codes move. ``"scales"`` trains
            scales, norms and biases. ``"side"`` adds LoRA beside the weight, through PEFT.
        rank: R of ``"grid"`` and ``"side"``.
        alpha: The adapter counts ``alpha / rank`` times; ``None`` takes the rank.
        dropout: On the input of ``"side"`` adapters; inside the rounding there is none.
        target_modules: Names, parts of names or globs of the layers to adapt; ``None`` takes all quantized linear
            layers and experts but output heads.
        modules_to_save: Names, parts of names or globs of float modules that train along, whole; ``None`` takes the
            heads of classifiers.
        seed: Of the adapter's start, and of the dither that stands for rounding residuals which PTQ did not keep.

    Returns:
        ``model``, in place; for ``"side"`` the ``PeftModel`` around it.

    Raises:
        ConfigError: If an argument is wrong or does not fit the model.
    """
    check_choice("adapter", adapter, ADAPTERS)
    if adapter == "side":
        from hfquant.hf.peft import add_side_adapter

        return add_side_adapter(model, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules)
    raise ConfigError(f"adapter={adapter!r}: this version cannot train it yet")


def merge_adapters(model: Model) -> Any:
    """Turn a model that was fine-tuned into the quantized model it computes as: no code changes."""
    raise ConfigError("this version cannot merge yet")

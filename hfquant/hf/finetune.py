"""``prepare_model_for_finetuning`` and ``merge_adapters``: quantized models to fine-tuning and back, in place."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging

from hfquant.errors import ConfigError
from hfquant.finetune.adapted import ADAPTED_AS, FinetuneState, adapted_modules
from hfquant.finetune.grid import add_grid_adapters_
from hfquant.finetune.merge import check_rounded, merge_modules_
from hfquant.finetune.scales import train_scales_
from hfquant.hf.bitsandbytes import is_bitsandbytes
from hfquant.hf.config import check_choice, check_integer
from hfquant.hf.peft import add_side_adapter, merge_side_adapter
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.hf.roles import TASK_HEADS, model_roles
from hfquant.nn.fake_quant_module import Adapter
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.swap import keep_packed_from_ddp_, packed_modules
from hfquant.schemes import ModulePattern


logger = logging.get_logger(__name__)

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
    progress: bool = True,
) -> Any:
    """Let a quantized model train, with its weights packed all the time; make optimizers afterwards.

    ``save_pretrained`` saves the packed model of the current state, at any moment.

    Args:
        model: Quantized by hfquant, with packed layers.
        adapter: ``"grid"`` trains low-rank changes inside the rounding, and scales: codes move. ``"scales"`` trains
            scales, norms and biases. ``"side"`` adds LoRA beside the weight, through PEFT. All else is frozen.
        rank: R of ``"grid"`` and ``"side"``.
        alpha: The adapter counts ``alpha / rank`` times; ``None`` takes the rank.
        dropout: On the input of ``"side"`` adapters; inside the rounding there is none.
        target_modules: Names, parts of names or globs of the layers to adapt; ``None`` takes all quantized linear
            layers and experts but output heads.
        modules_to_save: Names, parts of names or globs of float modules that train along, whole; ``None`` takes the
            heads of classifiers.
        seed: Of the adapter's start, and of the dither that stands for rounding residuals which PTQ did not keep.
        progress: Show a progress bar.

    Returns:
        ``model``, in place; for ``"side"`` the ``PeftModel`` around it.

    Raises:
        ConfigError: If an argument is wrong or does not fit the model, or the model is in training already.
    """
    _check_arguments(adapter, rank, dropout, seed)
    if adapter == "side":
        names = _side_targets(model, target_modules)
        settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "target_modules": names}
        return add_side_adapter(model, modules_to_save=modules_to_save, **settings)
    quantizer = _quantizer(model, adapter)
    names = _targets(model, target_modules)
    kept = list(_float_parameters(model, modules_to_save))
    if adapter == "scales":
        kept += [name for name, p in model.named_parameters() if _is_norm_or_bias(name, p) and name not in kept]
    model.requires_grad_(False)
    for name in kept:
        model.get_parameter(name).requires_grad_(True)
    schemes = {name: str(module.scheme) for name, module in packed_modules(model) if name in names}
    state = FinetuneState(adapter, schemes, sorted(kept))
    if adapter == "grid":
        state.rank, state.alpha = rank, float(rank if alpha is None else alpha)
        state.residual = add_grid_adapters_(model, names, Adapter(rank, state.alpha), seed=seed, progress=progress)
        logger.info(f"hfquant: {_RESIDUALS[state.residual]}")
    else:
        train_scales_(model, names)
    quantizer.finetuning = state
    keep_packed_from_ddp_(model)  # residuals are new
    return model


_RESIDUALS = {
    "ptq": "the adapters start from the rounding residuals that PTQ kept",
    "dither": "PTQ kept no rounding residuals (keep_residual=True does): seeded dither stands for them",
    "mixed": "PTQ kept the rounding residuals of some layers; for the others seeded dither stands for them",
}


def merge_adapters(model: Model, *, data: Iterable[Any] | None = None) -> Any:
    """Turn a model in fine-tuning into the quantized model it computes as, in place: no code changes.

    Afterwards it is a quantized model like any other: it saves, reloads, pushes, exports and dequantizes alike. A
    ``PeftModel`` is merged as ``merge_and_unload`` does, which rounds; ``merge_report`` says what that cost.

    Args:
        model: In fine-tuning.
        data: For a ``PeftModel``: batches with labels, on which the report has the loss before and after.

    Returns:
        ``model``; for a ``PeftModel`` the quantized model inside.

    Raises:
        ConfigError: If the model is not in fine-tuning, or its weights are not rounded yet.
        SchemeError: If training diverged.
    """
    if hasattr(model, "merge_and_unload"):
        return merge_side_adapter(model, data)
    state = finetune_state(model)
    if state is None:
        raise ConfigError("the model is not in fine-tuning: call prepare_model_for_finetuning first")
    quantizer: HfQuantQuantizer = model.hf_quantizer  # type: ignore[assignment]
    check_rounded(model)
    summary = state.summary(model)
    merge_modules_(model)
    quantizer.quantization_config.finetuning, quantizer.finetuning = summary, None
    return model


def finetune_state(model: nn.Module) -> FinetuneState | None:
    """What ``prepare_model_for_finetuning`` left on ``model``; ``None`` if it is not in fine-tuning."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.finetuning if isinstance(quantizer, HfQuantQuantizer) else None


def _check_arguments(adapter: str, rank: int, dropout: float, seed: int) -> None:
    if adapter is None:
        raise ConfigError(f"adapter=None: expected one of {', '.join(map(repr, ADAPTERS))}")
    check_choice("adapter", adapter, ADAPTERS)
    check_integer("rank", rank, 1)
    check_integer("seed", seed, 0)
    if dropout and adapter != "side":
        raise ConfigError(
            f"dropout={dropout} with adapter={adapter!r}: what is rounded cannot be dropped at random, or the saved "
            "codes were never computed with; use adapter='side', or 0"
        )


def _quantizer(model: nn.Module, adapter: str) -> HfQuantQuantizer:
    if is_bitsandbytes(model):
        raise ConfigError(
            f"adapter={adapter!r} trains hfquant's packed layers; with backend='bitsandbytes' use adapter='side'"
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"the model has a PEFT adapter; merge or unload it before adapter={adapter!r}")
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, HfQuantQuantizer) or next(packed_modules(model), None) is None:
        raise ConfigError(
            "the model is not quantized by hfquant: load a quantized one, or call quantize_model_ptq(model, ...) "
            "first; to train a float model for its grid use quantization_mode='qat'"
        )
    if next(adapted_modules(model), None) is not None:
        raise ConfigError("the model is in fine-tuning already; call merge_adapters(model) before another start")
    return quantizer


def _side_targets(model: nn.Module, patterns: Sequence[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    return list(patterns) if is_bitsandbytes(model) else _targets(model, patterns)


def _targets(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """The packed modules to adapt."""
    roles = model_roles(model)
    tables = {*roles.embeddings, *roles.heads}
    packed = dict(packed_modules(model))
    able = [name for name, module in packed.items() if type(module) in ADAPTED_AS and name not in tables]
    if patterns is None:
        if not able:
            raise ConfigError("no quantized linear layer to adapt; only embeddings and output heads are quantized")
        return able
    chosen = set()
    for pattern in _patterns("target_modules", patterns):
        found = [name for name in packed if pattern.matches(name)]
        wrong = next((name for name in found if name not in able), None)
        if wrong is not None or not found:
            what = f"matches {wrong}, an embedding or output head" if wrong else "matches no quantized layer"
            raise ConfigError(
                f"target_modules: {pattern.text!r} {what}; give names, parts of names or globs of quantized linear "
                f"layers, like {able[0]!r}"
                if able
                else f"target_modules: {pattern.text!r} {what}"
            )
        chosen |= set(found)
    return [name for name in able if name in chosen]


def _float_parameters(model: nn.Module, patterns: Sequence[str] | None) -> Iterator[str]:
    """Names of the float parameters of the modules that train whole."""
    automatic = patterns is None
    wanted = (
        [ModulePattern(head) for head in TASK_HEADS] if patterns is None else _patterns("modules_to_save", patterns)
    )
    for pattern in wanted:
        modules = {name: module for name, module in model.named_modules() if pattern.matches(name)}
        packed = next((name for name, module in modules.items() if isinstance(module, PackedModule)), None)
        if automatic and packed is not None:
            continue  # it was quantized with the rest, and has an adapter like the rest
        if not automatic and (packed is not None or not modules):
            what = f"matches {packed}, which is quantized: it has an adapter" if packed else "matches no module"
            raise ConfigError(f"modules_to_save: {pattern.text!r} {what}")
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] in modules and parameter.is_floating_point():
                yield name


def _patterns(field: str, patterns: Sequence[str]) -> list[ModulePattern]:
    if isinstance(patterns, str) or not patterns:
        raise ConfigError(f"{field}={patterns!r}: expected a list of module names, parts of names or globs")
    return [ModulePattern(pattern) for pattern in patterns]


def _is_norm_or_bias(name: str, parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and (parameter.ndim <= 1 or name.endswith("bias"))

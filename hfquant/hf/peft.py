"""PEFT on packed layers: ``LoraConfig`` works as on a float model, in any order of imports.

What PEFT has no extension point for is wrapped once, when PEFT is imported: the choice of the LoRA layer, the checks
before adapters are injected, and merging. ``hfquant_autoload`` wraps ``prepare_model_for_kbit_training``. Nothing here
imports PEFT itself, and models without packed layers go through unchanged.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hfquant.errors import ConfigError
from hfquant.finetune.side import MergeReport, merge_report
from hfquant.hf.bitsandbytes import bitsandbytes_layers
from hfquant.hf.roles import TASK_HEADS
from hfquant.hf.trl import wrap_fused_head
from hfquant.nn.adapted_module import AdaptedModule
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_linear import QuantLinear
from hfquant.nn.swap import packed_modules
from hfquant_autoload import after_import, prepare_packed_models


logger = logging.get_logger(__name__)

INITIALISATIONS = (True, False, "gaussian", "eva")
"""Of ``init_lora_weights``: those that neither read nor change the base weight."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""End of a model's class name -> PEFT's task, which also says what head is trained in full."""

TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Those of ``TASKS`` for which PEFT trains a head in full."""


# What users and the Trainer call.


def add_side_adapter(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> Any:
    """Put a LoRA adapter beside the quantized linear layers of ``model``: QLoRA's semantics, on hfquant's codes.

    Args:
        model: Quantized model, by hfquant or by bitsandbytes.
        rank: R.
        alpha: The adapter counts ``alpha / rank`` times; ``None`` takes the rank.
        dropout: Of the adapter's input, while training.
        target_modules: As in ``LoraConfig``; ``None`` takes every quantized linear layer but the heads.
        modules_to_save: As in ``LoraConfig``: modules that train in full; ``None`` takes the heads of classifiers.

    Returns:
        The ``PeftModel``.

    Raises:
        ConfigError: If PEFT is not installed, or ``model`` has no quantized linear layer.

    References:
        Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("adapter='side' is a PEFT adapter: pip install peft") from error
    names = _default_targets(model) if target_modules is None else target_modules
    if not names:
        raise ConfigError("no linear layer is quantized that an adapter could stand beside; quantize the model first")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names if isinstance(names, str) else list(names),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        task_type=next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None),
    )
    return get_peft_model(model, config)


def _default_targets(model: nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    packed = [(name, module) for name, module in packed_modules(model) if isinstance(module, QuantLinear)]
    return [
        name
        for name, module in (*packed, *bitsandbytes_layers(model))
        if module is not head and name.split(".")[-1] not in TASK_HEADS  # PEFT trains those in full
    ]


def merge_side_adapter(model: Any, data: Iterable[Any] | None = None, **options: Any) -> Any:
    """``model.merge_and_unload()``, with the loss before and after in the report.

    Args:
        model: ``PeftModel`` on a model quantized by hfquant.
        data: Batches with labels, as mappings of the model's arguments; ``None`` measures no loss.
        **options: Of PEFT's ``merge_and_unload``.

    Returns:
        The quantized model with new codes, and what the merge cost in ``merge_report`` (a ``MergeReport``).

    Raises:
        ConfigError: If the merge is refused, or the batches have no labels.
        SchemeError: If an adapter makes weights that are not finite.
    """
    batches = None if data is None else list(data)
    before = None if batches is None else mean_loss(model, batches)
    merged = model.merge_and_unload(**options)
    if batches is not None and hasattr(merged, "merge_report"):
        report = dataclasses.replace(merged.merge_report, loss_before=before, loss_after=mean_loss(merged, batches))
        merged.merge_report = report
        logger.warning(f"hfquant: loss on the given data {report.loss_before:.4f} -> {report.loss_after:.4f}")
    return merged


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any]) -> float:
    """Mean of the model's own loss over ``batches`` in evaluation mode.

    Raises:
        ConfigError: If the model returns no loss: the batches have no labels.
    """
    training, device, losses = model.training, next(model.parameters()).device, []
    model.eval()
    for batch in batches:
        moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        loss = model(**moved).loss
        if loss is None:
            raise ConfigError("the model returns no loss for a batch of data: give batches with labels")
        losses.append(float(loss))
    model.train(training)
    return sum(losses) / max(1, len(losses))


# What is wrapped in PEFT.


def install() -> None:
    """Wrap PEFT's functions, now if it is imported, else as soon as it is."""
    after_import("peft.tuners.tuners_utils", _wrap_tuners)
    after_import("peft.tuners.lora.model", _wrap_lora)
    for name in ("peft.utils.other", "peft.utils", "peft"):
        after_import(name, prepare_packed_models)
    after_import("trl.trainer.utils", wrap_fused_head)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any], *, static: bool = False) -> None:
    """Put ``wrapper(original, ...)`` in the place of ``owner.name``, once."""
    original = getattr(owner, name)
    if hasattr(original, "by_hfquant"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.by_hfquant = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def _wrap_tuners(module: ModuleType) -> None:
    _wrap(module.BaseTuner, "inject_adapter", _inject_adapter)
    _wrap(module.BaseTuner, "_check_merge_allowed", _check_merge_allowed)
    _wrap(module.BaseTuner, "merge_adapter", _reporting)
    _wrap(module.BaseTuner, "_unload_and_optionally_merge", _unload)


def _wrap_lora(module: ModuleType) -> None:
    _wrap(module.LoraModel, "_create_new_module", _create_new_module, static=True)


def _create_new_module(original: Callable[..., Any], config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if not isinstance(base, PackedModule) or config._custom_modules:
        return original(config, adapter_name, target, **kwargs)
    from hfquant.hf.peft_layers import packed_lora_layer

    return packed_lora_layer(target, base, adapter_name, config, **kwargs)


def _inject_adapter(
    original: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    if next(packed_modules(model), None) is not None:
        config = tuner.peft_config[adapter_name]
        check_adapter_config(tuner, model, config)
        restore_trained_in_full_(model, config)
    return original(tuner, model, adapter_name, *args, **kwargs)


def _check_merge_allowed(original: Callable[..., Any], tuner: Any) -> None:
    counts: dict[int, list[str]] = {}
    for name, module in packed_modules(tuner.model):
        counts.setdefault(id(module._parameters.get("weight")), []).append(name)
    for _, layer in _lora_layers(tuner.model):
        names = counts[id(layer.get_base_layer()._parameters["weight"])]
        if len(names) > 1:
            raise ConfigError(
                f"{' and '.join(names)} share one packed weight: merging the adapter of one would change the other. "
                "Keep the adapter beside the weight, or leave the output head out of target_modules"
            )
    original(tuner)


def _reporting(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    layers = list(_lora_layers(tuner.model))
    result = original(tuner, *args, **kwargs)
    records = [layer.merge_record for _, layer in layers if layer.merge_record is not None]
    if records:
        report: MergeReport = merge_report(records)
        tuner.model.merge_report = report
        logger.warning(f"hfquant: {report}")
    return result


def _unload(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    layers = [layer for _, layer in _lora_layers(tuner.model)]
    result = _reporting(original, tuner, *args, **kwargs)
    bases = [layer.get_base_layer() for layer in layers if layer.merge_record is not None]
    for base in bases:
        base.sqnr_db.clear()  # of codes that are others now
    quantizer = getattr(tuner.model, "hf_quantizer", None)
    if bases and quantizer is not None:
        report, scales = tuner.model.merge_report, sum(base.packed().weight_scale.numel() for base in bases)
        counts = {"codes": report.weights, "codes_moved": report.codes_changed, "scales": scales, "scales_moved": 0}
        quantizer.quantization_config.finetuning = {"adapter": "side", "residual": None} | counts
    return result


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "merge_record"):
            yield name, module


# What is refused before anything is changed.


def check_adapter_config(tuner: Any, model: nn.Module, config: Any) -> None:
    """Refuse an adapter that would take codes for weights.

    Raises:
        ConfigError: Naming the first layer, the reason, and what can be done.
    """
    targets = list(_targets(tuner, model, config))
    method = config.peft_type.value
    if method != "LORA":
        if targets:
            raise ConfigError(
                f"{method} on {targets[0][0]}: hfquant's packed layers take LoRA and DoRA; this method reads or "
                "rewrites the weight, which holds integer codes. Use LoraConfig, fine-tune with adapter='grid', or "
                "call dequantize_model(model) first"
            )
        return
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name) and field.name != "use_dora"
    ]
    if targets and variants:
        raise ConfigError(f"{variants[0]}: LoRA on hfquant's packed layers knows no variant but use_dora")
    if targets and config.init_lora_weights not in INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} computes with the base weight, which is packed; expected "
            f"one of {', '.join(map(repr, INITIALISATIONS))}"
        )
    for name, module in targets:
        if isinstance(module, AdaptedModule):
            raise ConfigError(f"{name} is in fine-tuning with another adapter; call merge_adapters(model) first")
        if isinstance(module, QuantEmbedding) and config.use_dora:
            raise ConfigError(f"use_dora on {name}: DoRA reads the codes of an embedding; use LoRA, or leave it out")
        if not isinstance(module, QuantLinear | QuantEmbedding):
            raise ConfigError(f"LoRA on {name}: {FUSED_EXPERTS}")
    _check_parameters(model, config)


FUSED_EXPERTS = "packed experts take no PEFT adapter; fine-tune them with adapter='grid' or 'scales'"


def _check_parameters(model: nn.Module, config: Any) -> None:
    for name, module in packed_modules(model):
        for key in module.float_weights:
            full = f"{name}.{key}"
            if any(full == wanted or full.endswith(f".{wanted}") for wanted in config.target_parameters or ()):
                raise ConfigError(f"target_parameters names {full}: {FUSED_EXPERTS}")
        if isinstance(module, QuantEmbedding) and getattr(config, "trainable_token_indices", None):
            raise ConfigError(
                f"trainable_token_indices: {name} is packed, and single rows of it cannot train; load the model with "
                f"skip_modules=[{name!r}], or put the embedding into target_modules"
            )


def _targets(tuner: Any, model: nn.Module, config: Any) -> Iterator[tuple[str, PackedModule]]:
    """Packed layers that ``config`` would adapt, with their names."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    found = copy.deepcopy(config)
    found = tuner._prepare_adapter_config(found, tuner.get_model_config(model))
    if hasattr(found, "target_modules"):
        found = _maybe_include_all_linear_layers(found, model)
    for name, module in model.named_modules():
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(base, PackedModule) and name and tuner._check_target_module_exists(found, name):
            yield name, base


def restore_trained_in_full_(model: nn.Module, config: Any) -> None:
    """Make the packed modules in ``modules_to_save`` float again: they train in full, and codes cannot.

    Raises:
        ConfigError: If one of them shares its packed weight with another module.
    """
    wanted = tuple(getattr(config, "modules_to_save", None) or ())
    if config.task_type in TASKS_WITH_HEADS:  # PEFT adds them to modules_to_save, for some tasks only later
        wanted += TASK_HEADS
    packed = list(packed_modules(model))
    for name, module in packed:
        parts = name.split(".")
        if not any(".".join(parts[-len(key.split(".")) :]) == key or f".{key}." in f".{name}." for key in wanted):
            continue
        shared = [n for n, m in packed if m is not module and m._parameters.get("weight") is module.weight]
        if shared:
            raise ConfigError(
                f"modules_to_save names {name}, which shares its packed weight with {shared[0]}; load the model with "
                f"skip_modules=[{name!r}, {shared[0]!r}] to train it in full"
            )
        module.restore_()
        _forget(model, name)
        logger.info(f"hfquant: {name} is float from now on: modules_to_save trains it in full")


def _forget(model: nn.Module, name: str) -> None:
    """Note in the config and the selection that ``name`` is float."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    schemes = quantizer.selection.schemes
    schemes.pop(name, None)
    quantizer.selection.kept[name] = "trained in full by an adapter (modules_to_save)"
    config = quantizer.quantization_config
    config.modules = {key: value for key, value in config.modules.items() if key != name}


# Preparing for training.


def prepare_packed_model(prepare: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's ``prepare_model_for_kbit_training``, which treats packed models as it treats bitsandbytes' ones.

    Parameters are frozen, norms and other float parameters become float32, and gradient checkpointing is switched on
    unless ``use_gradient_checkpointing=False``.
    """
    model.is_loaded_in_8bit = True  # how PEFT recognises bitsandbytes
    try:
        prepared = prepare(model, *args, **kwargs)
    finally:
        del model.is_loaded_in_8bit
    for _, module in packed_modules(prepared):
        module.compute_dtype = torch.float32
    return prepared

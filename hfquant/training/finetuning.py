"""What ``QuantTrainer`` does to a quantized model before it trains, and what identifies such a run."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hfquant.errors import ConfigError
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.finetune import finetune_state, prepare_model_for_finetuning
from hfquant.hf.qat import qat_state
from hfquant.hf.quantize import quantize_model_ptq
from hfquant.training.config import TrainingConfig


def ready_to_finetune(model: nn.Module | None, args: TrainingConfig) -> Any:
    """``model`` with the adapter that ``args`` asks for; one that is prepared already stays as it is.

    Raises:
        ConfigError: If there is no model, it is prepared for another adapter, or the two do not fit.
    """
    if model is None:
        raise ConfigError("enable_quantized_finetuning=True needs model=..., not model_init=...")
    _check_transformers(model)
    state = finetune_state(model)
    found = "side" if hasattr(model, "peft_config") else None if state is None else state.adapter
    if found is not None:
        if found != args.adapter:
            raise ConfigError(f"adapter={args.adapter!r}, but the model was prepared with adapter={found!r}")
        return model
    return prepare_model_for_finetuning(
        model,
        args.adapter,
        rank=args.adapter_rank,
        alpha=args.adapter_alpha,
        dropout=args.adapter_dropout,
        target_modules=args.adapter_target_modules,
        modules_to_save=args.adapter_modules_to_save,
        seed=args.seed,
        progress=not args.disable_tqdm,
    )


def _check_transformers(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
        raise ConfigError(
            f"{type(model).__name__} is no Transformers model, whose checkpoints QuantTrainer writes; call "
            "prepare_model_for_finetuning(model, ...), train it in a loop of yours, and save_quantized(model, ...)"
        )


def quantize_to_train_scales(model: nn.Module, config: HfQuantConfig, batches: Any, args: TrainingConfig) -> None:
    """PTQ of the float ``model``, in place, and its scales, norms and biases ready to train; raises what these do.

    References:
        Chen et al. 2025 (EfficientQAT), section 3.3, https://arxiv.org/abs/2407.11062.
    """
    _check_transformers(model)
    quantize_model_ptq(model, config, calibration_data=batches, progress=not args.disable_tqdm)
    model.hf_quantizer.quantization_config.quantization_mode = "qat"  # type: ignore[union-attr]
    prepare_model_for_finetuning(
        model,
        "scales",
        target_modules=args.adapter_target_modules,
        modules_to_save=args.adapter_modules_to_save,
        progress=not args.disable_tqdm,
    )


def training_record(model: nn.Module, args: Any) -> dict[str, Any] | None:
    """What must be equal in a run and in the checkpoint it resumes from; ``None`` where hfquant trains nothing."""
    state = qat_state(model) or finetune_state(model)
    if state is not None:
        return state.record()
    if getattr(args, "enable_quantized_finetuning", False):
        adapter = {"adapter": args.adapter, "adapter_rank": args.adapter_rank, "adapter_alpha": args.adapter_alpha}
        return {"quantization_mode": "finetune"} | adapter | {"adapter_target_modules": args.adapter_target_modules}
    return None

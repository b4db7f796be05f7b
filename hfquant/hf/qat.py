"""``prepare_model_qat`` and ``convert_model_qat``: whole models to quantization-aware training and back, in place."""

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hfquant.errors import ConfigError
from hfquant.hf.calibration import calibration_options, read_calibration_data
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.fuse import fuse_model_
from hfquant.hf.quantize import _attach, _check_calibration_data, _check_is_float
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.hf.roles import model_roles
from hfquant.nn.fake_quant_module import SHARED_SUFFIXES, Adapter
from hfquant.nn.swap import keep_packed_from_ddp_
from hfquant.numerics.packing import PackedWeight
from hfquant.ptq.calibrate import run_batch
from hfquant.ptq.quantize_matrix import CALIBRATED
from hfquant.ptq.quantize_weight import quantize_weight
from hfquant.ptq.training_start import start_from_ptq_
from hfquant.qat.convert import convert_modules_, converted
from hfquant.qat.prepare import fake_quant_modules, observe_input_scales_, prepare_modules_
from hfquant.schemes import WeightScheme


logger = logging.get_logger(__name__)

VARIANTS = ("full", "lora")

STATE = "hfquant_qat"
"""Attribute of a prepared model that holds its ``QatState``."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class QatState:
    """What a prepared model carries as ``model.hfquant_qat``.

    Attributes:
        quantizer: With the config and the selection; the model gets it when it is converted.
        variant: ``"full"`` or ``"lora"``.
        adapter: Of the ``"lora"`` variant.
    """

    quantizer: HfQuantQuantizer
    variant: str
    adapter: Adapter | None

    def record(self) -> dict[str, Any]:
        """What must be equal in a run and in the checkpoint it resumes from."""
        modules = {name: str(scheme) for name, scheme in self.quantizer.selection.schemes.items()}
        adapter = None if self.adapter is None else [self.adapter.rank, self.adapter.alpha]
        return {"quantization_mode": "qat", "qat_variant": self.variant, "adapter": adapter, "modules": modules}


def prepare_model_qat(
    model: Model,
    config: HfQuantConfig | None = None,
    *,
    variant: str = "full",
    adapter_rank: int = 16,
    adapter_alpha: float | None = None,
    calibration_data: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    **overrides: Any,
) -> Model:
    """Let a float model compute as it will when it is quantized, and train for it, in place.

    Parameters keep their names and identity; make optimizers afterwards, because learned scales join them.

    With ``algorithm="gptq"``, ``"signround"`` or ``"awq"`` training starts where that calibrated PTQ ends: weights
    become those that it rounds, so that the first step computes what ``quantize_model_ptq`` would ship (bit for bit
    where weights are float32, which rounding them to bfloat16 can end). Meanwhile a copy of the model is in memory.
    Distil from a copy of the float model then: the weights are not its own any more.

    Args:
        model: Float model, a ``PreTrainedModel`` or any ``nn.Module``.
        config: How it will be quantized; ``None`` starts from the defaults.
        variant: ``"full"`` trains all weights; ``"lora"`` only adapters inside the rounding, ``W0 + alpha / rank *
            BA``, and scales, and freezes all else.
        adapter_rank: R of ``"lora"``.
        adapter_alpha: Its ``alpha``; ``None`` takes the rank.
        calibration_data: For calibrated algorithms, and for ``quantization_type="static"``, where ranges start from:
            as for ``quantize_model_ptq``.
        tokenizer: For texts; ``None`` takes the one beside the model.
        progress: Show progress bars.
        **overrides: Fields of ``HfQuantConfig`` that replace those of ``config``.

    Returns:
        ``model``.

    Raises:
        ConfigError: If a field is wrong, does not fit the model, the model is quantized or prepared already, or
            nothing would train.
        CalibrationError: If calibration data is missing, empty or does not reach every static layer.
        SchemeError: If a weight holds NaN or infinity.

    References:
        LoRA inside the rounding: Bondarenko et al. 2024 (LR-QAT), https://arxiv.org/abs/2406.06385.
    """
    fields = {} if config is None else {k: v for k, v in vars(config).items() if k not in ("quant_method", "requested")}
    config = HfQuantConfig(**copy.deepcopy(fields) | overrides)
    if config.budget() is not None:
        raise ConfigError("target_bits, target_size and target_error are for quantize_model_ptq; give overrides here")
    adapter = _adapter(variant, adapter_rank, adapter_alpha)
    _check_unprepared(model)
    quantizer = HfQuantQuantizer(config, pre_quantized=False)
    quantizer.select(model)
    schemes = quantizer.selection.schemes.values()
    static = any(scheme.quantization_type == "static" for scheme in schemes)
    calibrated = config.resolved_algorithm in CALIBRATED
    _check_calibration_data(calibration_data, needed=static or calibrated, config=config)
    if all(scheme.weight.bits == 8 for scheme in schemes):
        logger.info("hfquant: INT8 loses so little that quantization-aware training rarely pays; compare with PTQ")
    batches: tuple[Any, ...] = ()
    if static or calibrated:
        batches = read_calibration_data(model, calibration_data, config, tokenizer).batches
    starts: Mapping[str, PackedWeight] = {}
    if calibrated:
        options = calibration_options(config, progress=progress)
        starts = start_from_ptq_(model, quantizer.selection, batches, options)
    _swap(model, quantizer, variant, adapter, starts, progress=progress)
    fuse_model_(model)  # what is trained computes as what is shipped
    if static:
        observe_input_scales_(model, batches, run_batch, progress=progress)
    check_something_trains(model)
    return model


def _swap(
    model: nn.Module,
    quantizer: HfQuantQuantizer,
    variant: str,
    adapter: Adapter | None,
    starts: Mapping[str, PackedWeight],
    *,
    progress: bool,
) -> None:
    """Swap modules; their scales are those in ``starts``, else what is found without data."""
    roles, algorithm = model_roles(model), quantizer.quantization_config.resolved_algorithm
    data_free = "search" if algorithm in CALIBRATED else algorithm
    if adapter is not None:
        model.requires_grad_(False)

    def initial_scales(weight: Tensor, scheme: WeightScheme, name: str) -> PackedWeight:
        found = starts.get(name)
        return quantize_weight(weight, scheme, algorithm=data_free, name=name).packed if found is None else found

    prepare_modules_(
        model,
        quantizer.selection,
        initial_scales=initial_scales,
        adapter=adapter,
        without_adapter=roles.embeddings | roles.heads,
        progress=progress,
    )
    quantizer.prepared_for_qat = True
    model.__dict__[STATE] = QatState(quantizer, variant, adapter)
    _tie_grids(model, quantizer.selection.ties)


def _adapter(variant: str, rank: int, alpha: float | None) -> Adapter | None:
    if variant not in VARIANTS:
        raise ConfigError(f"qat_variant={variant!r}: expected one of {', '.join(map(repr, VARIANTS))}")
    if variant == "full":
        return None
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"adapter_rank={rank!r}: expected an integer from 1")
    return Adapter(rank, float(rank if alpha is None else alpha))


def _check_unprepared(model: nn.Module) -> None:
    if next(fake_quant_modules(model), None) is not None:
        raise ConfigError("the model is prepared for quantization-aware training already")
    _check_is_float(model)


def check_something_trains(model: nn.Module) -> None:
    """Refuse a model in which no parameter gets gradients.

    Raises:
        ConfigError: If every parameter is frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing would train: every parameter has requires_grad=False; unfreeze some, or use PTQ")


def _tie_grids(model: nn.Module, ties: dict[str, str]) -> None:
    """Tell Transformers that tied tables share their grid, too."""
    if isinstance(model, PreTrainedModel):
        for name, owner in ties.items():
            for suffix in SHARED_SUFFIXES:
                if f"weight_{suffix}" in model.get_submodule(name)._parameters:
                    model.all_tied_weights_keys[f"{name}.weight_{suffix}"] = f"{owner}.weight_{suffix}"


def _untie_grids(model: nn.Module) -> dict[str, str]:
    """Undo ``_tie_grids``; returns what it removed."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    suffixes = tuple(f"weight_{suffix}" for suffix in SHARED_SUFFIXES)
    return {key: keys.pop(key) for key in list(keys) if key.endswith(suffixes)}


def qat_state(model: nn.Module) -> QatState | None:
    """What ``prepare_model_qat`` left on ``model``; ``None`` if it is not prepared."""
    state = getattr(model, STATE, None)
    return state if isinstance(state, QatState) else None


def convert_model_qat(model: Model) -> Model:
    """Turn a prepared and trained model into the quantized model it has been computing as, in place.

    Its codes and scales are those of the last forward. Afterwards it is what ``quantize_model_ptq`` leaves: it saves,
    reloads, pushes and dequantizes alike.

    Raises:
        ConfigError: If the model is not prepared, or is not fully quantized yet (its blend is below 1).
        SchemeError: If training diverged.
    """
    state = _require_state(model)
    convert_modules_(model, state.quantizer.selection.ties)
    _attach_converted(model, state)
    del model.__dict__[STATE]
    return model


@contextmanager
def converted_model(model: nn.Module) -> Iterator[None]:
    """Within: ``model`` is what ``convert_model_qat`` makes of it; afterwards it trains on.

    Raises:
        ConfigError: As ``convert_model_qat``.
        SchemeError: As ``convert_model_qat``.
    """
    state = _require_state(model)
    with converted(model, state.quantizer.selection.ties):
        before = {name: model.__dict__.get(name) for name in ("_weight_conversions", "quantization_method")}
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        _attach_converted(model, state)
        try:
            yield
        finally:
            _detach(model, before, ties)


def _require_state(model: nn.Module) -> QatState:
    state = qat_state(model)
    if state is None:
        raise ConfigError("the model is not prepared for quantization-aware training: call prepare_model_qat first")
    return state


def _attach_converted(model: nn.Module, state: QatState) -> None:
    quantizer, selection = state.quantizer, state.quantizer.selection
    config = quantizer.quantization_config
    config.freeze({name: str(scheme) for name, scheme in selection.schemes.items()}, version("hfquant"))
    config.quantization_mode = "qat"
    quantizer.pre_quantized, quantizer.prepared_for_qat = True, False
    _untie_grids(model)
    _attach(model, quantizer, selection)


def _detach(model: nn.Module, before: dict[str, Any], ties: dict[str, str]) -> None:
    state = _require_state(model)
    state.quantizer.pre_quantized, state.quantizer.prepared_for_qat = False, True
    keep_packed_from_ddp_(model)  # nothing is packed now
    if not isinstance(model, PreTrainedModel):
        del model.hf_quantizer
        return
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
    for name, value in before.items():
        if value is None:
            model.__dict__.pop(name, None)
        else:
            setattr(model, name, value)
    model.all_tied_weights_keys.clear()
    model.all_tied_weights_keys.update(ties)


_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _say_what_is_saved(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if next(fake_quant_modules(self), None) is not None:
        logger.warning_once(
            "hfquant: this model is in quantization-aware training: its float weights and training state are saved, "
            "to go on with. convert_model_qat(model) makes it the quantized model"
        )
    return _save_pretrained(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _say_what_is_saved

"""``quantize_model_ptq`` and ``dequantize_model``: whole models in memory, in place."""

import copy
import warnings
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import _assign_is_quantized

from hfquant.errors import CalibrationError, ConfigError
from hfquant.hf.allocation import allocate_bits_
from hfquant.hf.bitsandbytes import (
    BACKEND,
    dequantize_bitsandbytes_,
    is_bitsandbytes,
    quantize_with_bitsandbytes_,
)
from hfquant.hf.calibration import calibration_options, default_observer, read_calibration_data
from hfquant.hf.config import QUANT_METHOD, HfQuantConfig
from hfquant.hf.fuse import fuse_model_
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.hf.roles import tie_companions
from hfquant.nn.select import Selection
from hfquant.nn.swap import keep_packed_from_ddp_, packed_modules, restore_modules_
from hfquant.ptq.calibrated import calibrate_
from hfquant.ptq.quantize import quantize_modules_
from hfquant.ptq.quantize_matrix import CALIBRATED
from hfquant.ptq.store import Store


FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Model = TypeVar("Model", bound=nn.Module)


def quantize_model_ptq(
    model: Model,
    config: HfQuantConfig | None = None,
    *,
    calibration_data: Any = None,
    tokenizer: Any = None,
    resume: Store | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Model:
    """Quantize a trained float model after training, in place.

    Afterwards a Transformers model is what ``from_pretrained`` would have given: it saves, reloads, pushes and
    dequantizes alike. A plain ``nn.Module`` is saved with ``save_quantized``.

    Args:
        model: Float model (float32, bfloat16 or float16), a ``PreTrainedModel`` or any ``nn.Module``.
        config: What to do; ``None`` starts from the defaults.
        calibration_data: For ``algorithm="gptq"``, ``"signround"`` and ``"awq"``, for ``quantization_type="static"``,
            and for ``target_bits`` to see what errors cost the output: a text file, texts, lists of token ids, a
            ``datasets.Dataset`` with ``text`` or ``input_ids``, or batches that the model is called with (a DataLoader,
            mappings of its arguments, tuples, or tensors).
        tokenizer: For texts; ``None`` takes the one beside the model.
        resume: Keeps finished blocks of a calibrated run (``formats/resume.py``); the command line makes one.
        progress: Show progress bars.
        **overrides: Fields of ``HfQuantConfig`` that replace those of ``config``; ``quantization_bits=4`` alone works.

    Returns:
        ``model``.

    Raises:
        ConfigError: If a field is wrong, does not fit the model, the model is quantized already, or no choice of bits
            keeps to ``target_bits``, ``target_size`` or ``target_error``.
        CalibrationError: If calibration data is missing, empty or does not reach every static layer.
        SchemeError: If a weight holds NaN or infinity.
    """
    fields = {} if config is None else {k: v for k, v in vars(config).items() if k not in ("quant_method", "requested")}
    config = HfQuantConfig(**copy.deepcopy(fields) | overrides)
    _check_is_float(model)
    if config.backend == BACKEND:
        if calibration_data is not None:
            raise ConfigError("calibration_data: backend='bitsandbytes' does not calibrate; use backend='hfquant'")
        quantize_with_bitsandbytes_(model, config)
        return model
    quantizer = HfQuantQuantizer(config, pre_quantized=False)
    quantizer.select(model)
    training = model.training
    _quantize_(model, quantizer, calibration_data, tokenizer, resume, progress=progress)
    config.quantization_mode = None  # whatever the config was made for before
    config.freeze({name: str(scheme) for name, scheme in quantizer.selection.schemes.items()}, version("hfquant"))
    quantizer.pre_quantized = True
    _attach(model, quantizer, quantizer.selection)
    model.train(training)
    return model


def _quantize_(
    model: nn.Module,
    quantizer: HfQuantQuantizer,
    calibration_data: Any,
    tokenizer: Any,
    resume: Store | None,
    *,
    progress: bool,
) -> None:
    """Choose bits if there is a budget, then quantize what is selected, with data where that is needed."""
    config, selection = quantizer.quantization_config, quantizer.selection
    if config.algorithm is None and calibration_data is not None:
        config.algorithm = "gptq"
    static = any(scheme.quantization_type == "static" for scheme in selection.schemes.values())
    needed = static or config.resolved_algorithm in CALIBRATED
    if static and config.activation_observer is None:
        config.activation_observer = default_observer(model)
    budget, data = config.budget(), None
    _check_calibration_data(calibration_data, needed=needed, used=budget is not None, config=config)
    if calibration_data is not None and (needed or budget is not None):
        data = read_calibration_data(model, calibration_data, config, tokenizer)
        config.calibration = data.record()
    if budget is not None:
        batches = None if data is None else data.batches
        config.allocation = allocate_bits_(model, selection, config, budget, batches, resume=resume, progress=progress)
    if needed and data is not None:
        options = calibration_options(config, progress=progress)
        quantizer.results = calibrate_(model, selection, data.batches, options, resume)
        return
    algorithm = config.resolved_algorithm
    quantize_modules_(model, selection, algorithm=algorithm, store=resume, progress=progress)


def _check_is_float(model: nn.Module) -> None:
    """Refuse models whose weights are codes; forget a quantizer that left float weights (a dequantized GGUF)."""
    if next(packed_modules(model), None) is not None:
        raise ConfigError("the model is quantized by hfquant already; call dequantize_model(model) first")
    if not isinstance(model, PreTrainedModel) or not getattr(model, "is_quantized", False):
        return
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in FLOAT_DTYPES:
            method = getattr(model, "quantization_method", "another method")
            raise ConfigError(
                f"the model is quantized with {method} already ({name} is {parameter.dtype}); load it dequantized, or "
                "start from the float model"
            )
    model.hf_quantizer.remove_quantization_config(model)


def _check_calibration_data(data: Any, *, needed: bool, config: HfQuantConfig, used: bool = False) -> None:
    settings = config.resolve()
    if needed and data is None:
        what = f"algorithm={config.algorithm!r}" if config.algorithm in CALIBRATED else "quantization_type='static'"
        raise CalibrationError(
            f"{what} needs calibration_data: texts, token ids or batches that the model is called with"
        )
    if not needed and not used and data is not None:
        warnings.warn(
            f"calibration_data is not used: quantization_type={settings.quantization_type!r} with algorithm="
            f"{config.resolved_algorithm!r} needs none",
            UserWarning,
            stacklevel=3,
        )


def _attach(model: nn.Module, quantizer: HfQuantQuantizer, selection: Selection) -> None:
    """Leave ``model`` as ``from_pretrained`` leaves a quantized one."""
    model.hf_quantizer = quantizer
    keep_packed_from_ddp_(model)
    fuse_model_(model)
    if not isinstance(model, PreTrainedModel):
        return
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config
    tie_companions(model, selection.ties)
    model._weight_conversions = []
    _assign_is_quantized(model)


def dequantize_model(model: Model, dtype: torch.dtype = torch.float32) -> Model:
    """Turn a quantized model into a standard float model that computes with the quantized weights' values, in place.

    Args:
        model: Model quantized by hfquant.
        dtype: Of all its parameters afterwards.

    Returns:
        ``model``: its original module classes, no quantization parameter, no trace of quantization in its config.

    Raises:
        ConfigError: If the model is not quantized by hfquant.
    """
    if is_bitsandbytes(model):
        return dequantize_bitsandbytes_(model, dtype)  # type: ignore[no-any-return]
    if next(packed_modules(model), None) is None:
        raise ConfigError("the model is not quantized by hfquant: there is nothing to dequantize")
    if isinstance(model, PreTrainedModel):
        model.dequantize(dtype)
        return model
    restore_modules_(model, dtype)
    del model.hf_quantizer
    return model.to(dtype)

"""Calibration data for a model of Transformers: its tokenizer, its window, its arguments."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from hfquant.errors import CalibrationError
from hfquant.hf.config import HfQuantConfig
from hfquant.ptq.calibrated import CalibrationOptions
from hfquant.ptq.calibration_data import CalibrationFormat, CalibrationSet, Tokenize, prepare_calibration


CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 128, 512
"""Windows and tokens in one, where the config says nothing."""


def read_calibration_data(model: nn.Module, data: Any, config: HfQuantConfig, tokenizer: Any) -> CalibrationSet:
    """``data`` as batches for ``model``, before any work on the model.

    Args:
        model: A ``PreTrainedModel``, or a plain module, which takes batches only.
        data: As for ``quantize_model_ptq``.
        config: Its ``calibration_samples``, ``calibration_length`` and ``seed`` count.
        tokenizer: For texts; ``None`` loads the one beside the model when it is needed.

    Raises:
        CalibrationError: If the data or the tokenizer cannot be used.
    """
    samples, seed = config.calibration_samples or CALIBRATION_SAMPLES, config.seed or 0
    if not isinstance(model, PreTrainedModel):
        return prepare_calibration(data, CalibrationFormat(samples=samples, seed=seed), None)
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    asked = config.calibration_length
    if asked is not None and limit is not None and asked > limit:
        raise CalibrationError(f"calibration_length={asked}: the model has {limit} positions; give at most that")
    names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    form = CalibrationFormat(
        samples=samples,
        length=asked or min(CALIBRATION_LENGTH, limit or CALIBRATION_LENGTH),
        packed=model.can_generate(),
        argument_names=names,
        vocab_size=getattr(text, "vocab_size", None),
        seed=seed,
    )
    return prepare_calibration(data, form, _tokenize(model, tokenizer))


def _tokenize(model: PreTrainedModel, tokenizer: Any) -> Tokenize:
    loaded = [tokenizer]

    def tokenize(text: str) -> Sequence[int]:
        if loaded[0] is None:
            loaded[0] = _load_tokenizer(model.config.name_or_path)
        ids: Sequence[int] = loaded[0](text, verbose=False)["input_ids"]
        return ids

    return tokenize


def _load_tokenizer(name_or_path: str) -> Any:
    if not name_or_path:
        raise CalibrationError("calibration_data holds texts, and the model does not know its folder; pass tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CalibrationError(
            f"calibration_data holds texts, and no tokenizer can be loaded from {name_or_path}: {reason}; pass "
            "tokenizer=, or token ids"
        ) from error


def default_observer(model: nn.Module) -> str:
    """``"percentile"`` for encoders, ``"minmax"`` for models that generate and for plain modules.

    The attention of decoders rests on a few tokens with huge activations, which must not be cut off; encoders have
    outliers that may (docs/decisions/0014-static-activations.md).
    """
    return "percentile" if isinstance(model, PreTrainedModel) and not model.can_generate() else "minmax"


def calibration_options(config: HfQuantConfig, *, progress: bool) -> CalibrationOptions:
    """What ``config`` says about how to calibrate."""
    return CalibrationOptions(
        algorithm=config.resolved_algorithm,
        iterations=config.iterations or CalibrationOptions.iterations,
        observer=config.activation_observer or CalibrationOptions.observer,
        smoothquant=config.smoothquant is not False,
        seed=config.seed or 0,
        progress=progress,
    )

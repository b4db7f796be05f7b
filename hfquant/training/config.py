"""``TrainingConfig``: Transformers' ``TrainingArguments`` with quantization, which is off by default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import TrainingArguments

from hfquant.errors import ConfigError
from hfquant.hf.config import TARGETS, USER_FIELDS, HfQuantConfig, check_choice, nearest
from hfquant.hf.finetune import ADAPTERS


MODES = ("ptq", "qat")
VARIANTS = ("full", "lora", "scales")
OF_THE_RUN = ("dequantize", "seed", *TARGETS)
"""Fields of ``HfQuantConfig`` that are no part of the scheme: training neither loads, nor draws, nor chooses bits."""


def _scheme_fields() -> list[tuple[str, Any, Any]]:
    """The fields of ``HfQuantConfig`` that say how to quantize, as dataclass fields: defined there, and only there."""
    found = []
    for name, kind in get_type_hints(HfQuantConfig.__init__).items():
        if name not in USER_FIELDS or name in OF_THE_RUN:
            continue
        if any(getattr(part, "__origin__", part) is Mapping for part in get_args(kind)):
            kind = dict | str | None  # how TrainingArguments types what the command line gives as JSON
        default = 8 if name == "quantization_bits" else None
        help_text = f"{name} of HfQuantConfig."
        found.append((name, kind, field(default=default, metadata={"help": help_text})))
    return found


SchemeFields: Any = make_dataclass("SchemeFields", _scheme_fields())


@dataclass
class TrainingConfig(TrainingArguments, SchemeFields):
    """``TrainingArguments`` and how to quantize; with the defaults, training is Transformers' own.

    The scheme has the fields of ``HfQuantConfig`` under the same names: ``quantization_bits``, ``quantization_type``,
    ``group_size``, ``symmetric``, ``algorithm``, ``embedding_bits``, ``skip_modules``, ``overrides``, ...

    Attributes:
        quantization_mode: ``None`` (off), ``"ptq"`` (quantize when training ends) or ``"qat"`` (train for the grid).
        enable_quantized_finetuning: Train adapters on a quantized model; see ``prepare_model_for_finetuning``.
        qat_variant: ``"full"`` trains all weights, ``"lora"`` adapters inside the rounding; ``"scales"`` quantizes the
            model at once, as ``algorithm`` says, and trains scales, norms and biases for its codes, which stay.
        adapter: Of quantized fine-tuning: ``"grid"`` (codes and scales move), ``"scales"`` (codes stay) or ``"side"``
            (LoRA beside the weight, through PEFT).
        adapter_rank: Rank of the adapters.
        adapter_alpha: The adapter counts ``alpha / rank`` times; ``None`` takes the rank.
        adapter_dropout: Dropout on the input of a ``"side"`` adapter; inside the rounding there is none.
        adapter_target_modules: Names, parts of names or globs of the quantized layers that get an adapter; ``None``
            takes all but embeddings and output heads.
        adapter_modules_to_save: Names, parts of names or globs of float modules that train along, whole; ``None``
            takes the heads of classifiers.
        adapter_delay_steps: Optimizer steps for which ``"grid"`` trains without rounding; then the weights are rounded
            anew on training batches, by the calibration that quantized the model (GPTQ, unless it was SignRound).
        scale_learning_rate: Learning rate of the logarithm of scales: a relative change. 0 keeps them.
        qat_blend_steps: Optimizer steps over which quantization is blended in; 0 starts with all of it.
        calibration_batches: Training batches for static activation ranges and calibrated algorithms; with
            ``algorithm="gptq"`` or ``"signround"``, quantization-aware training starts from that PTQ.
        distillation_weight: Share of distillation from the float model in the loss, from 0 to 1. Quantized fine-tuning
            has no float model: it learns from ``teacher_model``, or, from ``adapter_delay_steps`` on, from what the
            model computed before the rounding; with all of it from there adapters rest then, and scales train.
        distillation_temperature: Divides the logits of both models.

    Raises:
        ConfigError: If a field is unknown, of the wrong type, out of range, or in conflict.
    """

    quantization_mode: str | None = field(default=None, metadata={"help": "Off if not given; ptq or qat."})
    enable_quantized_finetuning: bool = field(default=False, metadata={"help": "Train adapters on a quantized model."})
    qat_variant: str = field(default="full", metadata={"help": "full, lora (inside the rounding) or scales."})
    adapter: str = field(default="grid", metadata={"help": "Of quantized fine-tuning: grid, scales or side."})
    adapter_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    adapter_alpha: float | None = field(default=None, metadata={"help": "Adapters count alpha / rank times."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "Of the input of side adapters."})
    adapter_target_modules: list[str] | None = field(default=None, metadata={"help": "Layers that get an adapter."})
    adapter_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Float modules to train."})
    adapter_delay_steps: int = field(default=0, metadata={"help": "Steps for which grid adapters are not rounded."})
    scale_learning_rate: float = field(default=1e-3, metadata={"help": "Of the logarithm of scales."})
    qat_blend_steps: int = field(default=0, metadata={"help": "Steps over which quantization is blended in."})
    calibration_batches: int = field(default=32, metadata={"help": "Batches for static ranges and calibrated PTQ."})
    distillation_weight: float = field(default=0.0, metadata={"help": "Share of distillation in the loss."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Divides the logits of both models."})

    def __post_init__(self) -> None:
        overrides = self.__dict__["overrides"]
        if isinstance(overrides, str):
            self.__dict__["overrides"] = _read_mapping(overrides, "overrides")
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        check_choice("quantization_mode", self.quantization_mode, MODES)
        check_choice("qat_variant", self.qat_variant, VARIANTS)
        check_choice("enable_quantized_finetuning", self.enable_quantized_finetuning, (True, False))
        check_choice("adapter", self.adapter, ADAPTERS)
        _check_number("adapter_rank", self.adapter_rank, int, 1, None)
        _check_number("adapter_dropout", self.adapter_dropout, float, 0, 1)
        _check_number("adapter_delay_steps", self.adapter_delay_steps, int, 0, None)
        _check_number("scale_learning_rate", self.scale_learning_rate, float, 0, None)
        _check_number("qat_blend_steps", self.qat_blend_steps, int, 0, None)
        _check_number("calibration_batches", self.calibration_batches, int, 1, None)
        _check_number("distillation_weight", self.distillation_weight, float, 0, 1)
        if self.adapter_dropout and self.adapter != "side":
            raise ConfigError(
                f"adapter_dropout={self.adapter_dropout} with adapter={self.adapter!r}: what is rounded cannot be "
                "dropped at random, or the saved codes were never computed with; use adapter='side', or 0"
            )
        if self.adapter_delay_steps and not (self.enable_quantized_finetuning and self.adapter == "grid"):
            raise ConfigError(
                f"adapter_delay_steps={self.adapter_delay_steps} needs enable_quantized_finetuning=True and "
                "adapter='grid', which trains inside the rounding"
            )
        if not self.distillation_temperature > 0:
            raise ConfigError(f"distillation_temperature={self.distillation_temperature!r}: expected more than 0")
        if self.distillation_weight and self.quantization_mode != "qat" and not self.enable_quantized_finetuning:
            raise ConfigError(
                f"distillation_weight={self.distillation_weight} needs quantization_mode='qat' or "
                f"enable_quantized_finetuning=True, not quantization_mode={self.quantization_mode!r}"
            )
        if self.quantization_mode is not None and self.enable_quantized_finetuning:
            raise ConfigError(
                f"quantization_mode={self.quantization_mode!r} starts from a float model, "
                "enable_quantized_finetuning=True from a quantized one; set one of them"
            )
        self.quantization_config()

    def quantization_config(self) -> HfQuantConfig:
        """The scheme, as ``quantize_model_ptq`` takes it.

        Raises:
            ConfigError: If a field of the scheme is wrong.
        """
        return HfQuantConfig(**{f.name: getattr(self, f.name) for f in fields(SchemeFields)})

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "TrainingConfig":
        """Read a YAML (or JSON) file; fields it does not have keep their defaults, so quantization is off.

        Args:
            path: Of the file.
            **overrides: Fields that replace those of the file.

        Raises:
            ConfigError: If the file cannot be read, or a field is unknown (the nearest name is given) or wrong.
        """
        return cls.from_fields(read_yaml(path) | overrides, where=str(path))

    @classmethod
    def from_fields(cls, given: Mapping[str, Any], *, where: str) -> "TrainingConfig":
        """Make a config of ``given`` fields, read from ``where``.

        Raises:
            ConfigError: If a field is unknown or wrong.
        """
        known = {f.name: f.type for f in fields(cls) if f.init}
        for name in given:
            if name not in known:
                raise ConfigError(f"{where}: {name} is not a field{nearest(str(name), tuple(known))}")
        # YAML 1.1 takes 2e-5 for a string.
        return cls(**{name: _as_number(name, value, known[name], where) for name, value in given.items()})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: If it cannot be read or is not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(content).__name__}")
    return content


def _as_number(name: str, value: Any, kind: Any, where: str) -> Any:
    kinds = {kind} | set(get_args(kind))
    if not isinstance(value, str) or float not in kinds or str in kinds:
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{where}: {name}={value!r}: expected a number") from None


def _read_mapping(text: str, name: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ConfigError(f"{name}={text!r}: expected a mapping, as JSON or YAML")
    return content


def _check_number(name: str, value: Any, kind: type, low: float, high: float | None) -> None:
    fits = (
        type(value) in ((int, float) if kind is float else (int,)) and value >= low and (high is None or value <= high)
    )
    if not fits:
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r}: expected {'a number' if kind is float else 'an integer'} {limit}")

"""``HfQuantConfig``: what a user asks for, checked field by field, and what ``config.json`` keeps of it."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfquant.errors import ConfigError
from hfquant.formats.native import FORMAT_VERSION
from hfquant.formats.shards import parse_size
from hfquant.ptq.allocate import Budget
from hfquant.schemes import MAX_GROUP_SIZE, ModuleOverride, ModulePattern, QuantizationSettings


QUANT_METHOD = "hfquant"

CHOICES: dict[str, tuple[Any, ...]] = {
    "quantization_bits": (8, 4),
    "quantization_type": ("dynamic", "static", "weight_only"),
    "symmetric": (True, False),
    "activation_symmetric": (True, False),
    "algorithm": ("rtn", "search", "awq", "gptq", "signround"),
    "activation_observer": ("minmax", "percentile", "mse"),
    "smoothquant": (True, False),
    "embedding_bits": (16, 8, 4),
    "backend": ("hfquant", "bitsandbytes"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "strict": (True, False),
    "dequantize": (True, False),
    "keep_residual": (True, False),
}
"""Field -> the values it takes, beside ``None`` for "not set"."""

OVERRIDE_CHOICES: dict[str, tuple[Any, ...]] = {
    "quantization_bits": (16, 8, 4),
    "quantization_type": CHOICES["quantization_type"],
    "symmetric": (True, False),
}
"""The same for the fields of one entry of ``overrides``; ``group_size`` is allowed there too."""

INTEGERS: dict[str, int] = {"iterations": 1, "calibration_samples": 1, "calibration_length": 2, "seed": 0}
"""Integer field -> the smallest value it takes."""

TARGETS = ("target_bits", "target_size", "target_error")
"""Fields that leave bits and groups of single layers to ``ptq/allocate.py``; at most one is set."""

USER_FIELDS = (*CHOICES, *INTEGERS, "group_size", "skip_modules", "overrides", *TARGETS)
RECORD_FIELDS = (
    *("quant_method", "format_version", "hfquant_version", "modules", "save_id", "quantization_mode"),
    *("calibration", "allocation", "finetuning"),
)
LOAD_ONLY_FIELDS = ("dequantize", "strict")


class HfQuantConfig(QuantizationConfigMixin):
    """How to quantize a model with hfquant; pass it as ``quantization_config`` to ``from_pretrained``.

    Every field left at ``None`` is resolved by ``resolve``; only what is said explicitly can be in conflict.

    Args:
        quantization_bits: Bits of the weights, 8 (default) or 4.
        quantization_type: ``"weight_only"`` (default for 4 bits), ``"dynamic"`` (INT8 activations, one scale and zero
            point per token at run time; default for 8 bits) or ``"static"`` (INT8 activations, scales from calibration
            data).
        group_size: Inputs that share a scale; -1 means one scale per output channel. ``None`` takes one scale per
            channel for 8 bits; for 4 bits the largest of 64, 32, 16 (128 too above a billion parameters) that divides
            the layer's inputs. A size that is given never changes: layers it does not divide are an error.
        symmetric: Weights without zero points (default ``True``).
        activation_symmetric: Dynamic activations without zero points. The default ``False`` spans the range of each
            token in 255 steps, about half the error; engines that read symmetric ones only need ``True``.
        algorithm: ``"gptq"`` (default where calibration data is given), ``"signround"`` (learned rounding, the best and
            slowest), ``"awq"`` (large inputs get finer weights where norms can absorb that, then the weighted search),
            ``"search"`` (default without data) or ``"rtn"`` (round to nearest).
        embedding_bits: Bits of the input embedding and the output head, 8 (default), 4, or 16 to keep them in float.
        skip_modules: Names, parts of names (``"mlp.down_proj"``) or globs of modules to keep in float.
        overrides: Module name, part or glob -> fields that differ there (``quantization_bits`` 16, 8 or 4,
            ``quantization_type``, ``group_size``, ``symmetric``); a later entry wins.
        backend: ``"hfquant"`` (default) or ``"bitsandbytes"``, with its own modules and checkpoints.
        bnb_4bit_quant_type: ``"nf4"`` (default) or ``"fp4"``, for 4 bits with bitsandbytes.
        bnb_4bit_use_double_quant: Whether bitsandbytes quantizes its scales too.
        activation_observer: What chooses static ranges: ``"minmax"`` (default for models that generate),
            ``"percentile"`` (default for encoders) or ``"mse"``.
        smoothquant: Move outliers of activations into the weights where that changes nothing else (default ``True``
            for calibrated INT8 activations).
        iterations: Of learned rounding (default 200).
        calibration_samples: Windows of calibration text at most (default 128).
        calibration_length: Tokens in a window (default 512, or what the model takes).
        seed: Of the choice of windows and of learned rounding (default 0).
        target_bits: Average bits per weight of the linear layers, scales included, as in 4.5: 4 bits in groups of 128,
            64, 32 or 16, or 8 bits, chosen for each layer by what its error costs. Embeddings, heads and layers with
            ``quantization_bits`` or ``group_size`` in ``overrides`` keep what they have, and do not count.
        target_size: Instead: bytes of all stored tensors, a number or as in ``"90MB"``.
        target_error: Instead: the smallest model whose estimated loss is at most this: mean KL in nats for models with
            logits, relative squared error of the output for others; without calibration data the sum over layers of
            noise to signal of their weights.
        strict: Raise if a linear layer would stay in float although nobody asked for it.
        dequantize: On loading a quantized checkpoint, return the float model of its values.
        keep_residual: Keep four more bits of each linear weight, what rounding took from it: fine-tuning with
            ``adapter="grid"`` starts better from them. Not needed to run the model.
        record: What a checkpoint adds (``modules``, ``save_id``, ``format_version``, ...); not for users.

    Raises:
        ConfigError: For an unknown field, a value of the wrong type or out of range.
    """

    def __init__(
        self,
        quantization_bits: int | None = None,
        quantization_type: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        algorithm: str | None = None,
        embedding_bits: int | None = None,
        skip_modules: list[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        backend: str | None = None,
        bnb_4bit_quant_type: str | None = None,
        bnb_4bit_use_double_quant: bool | None = None,
        strict: bool | None = None,
        dequantize: bool | None = None,
        activation_observer: str | None = None,
        smoothquant: bool | None = None,
        iterations: int | None = None,
        calibration_samples: int | None = None,
        calibration_length: int | None = None,
        seed: int | None = None,
        target_bits: float | None = None,
        target_size: int | str | None = None,
        target_error: float | None = None,
        activation_symmetric: bool | None = None,
        keep_residual: bool | None = None,
        **record: Any,
    ) -> None:
        self.quant_method, self.quantization_bits = QUANT_METHOD, quantization_bits
        self.quantization_type, self.group_size, self.symmetric = quantization_type, group_size, symmetric
        self.embedding_bits, self.requested = embedding_bits, dict[str, Any]()
        self.algorithm, self.backend, self.iterations, self.dequantize = algorithm, backend, iterations, dequantize
        self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant = bnb_4bit_quant_type, bnb_4bit_use_double_quant
        self.skip_modules, self.overrides, self.seed, self.keep_residual = skip_modules, overrides, seed, keep_residual
        self.activation_observer, self.smoothquant, self.strict = activation_observer, smoothquant, strict
        self.activation_symmetric = activation_symmetric
        self.calibration_samples, self.calibration_length = calibration_samples, calibration_length
        self.target_bits, self.target_size, self.target_error = target_bits, target_size, target_error
        self._take_record(record)
        self.check()

    def _take_record(self, record: dict[str, Any]) -> None:
        self.calibration, self.allocation = record.pop("calibration", None), record.pop("allocation", None)
        self.finetuning = record.pop("finetuning", None)
        self.modules: dict[str, str] | None = record.pop("modules", None)
        self.format_version: Any = record.pop("format_version", FORMAT_VERSION)
        self.hfquant_version, self.save_id = record.pop("hfquant_version", None), record.pop("save_id", None)
        self.quantization_mode: str | None = record.pop("quantization_mode", None)
        self.resume: Any = record.pop("resume", None)  # a store for finished weights, while from_pretrained runs
        _refuse_unknown(record)

    def check(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, what was given and what is allowed.
        """
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if getattr(self, name) is not None and (self.backend != "bitsandbytes" or self.quantization_bits != 4):
                raise ConfigError(f"{name} is for backend='bitsandbytes' with quantization_bits=4")
        for name, smallest in INTEGERS.items():
            check_integer(name, getattr(self, name), smallest)
        if self.keep_residual and self.backend == "bitsandbytes":
            raise ConfigError("keep_residual=True is for backend='hfquant'")
        check_group_size("group_size", self.group_size)
        if self.skip_modules is not None:
            if not isinstance(self.skip_modules, (list, tuple)):
                raise ConfigError(f"skip_modules={self.skip_modules!r}: expected a list of module names or globs")
            for pattern in self.skip_modules:
                ModulePattern(pattern)
        self._overrides()
        self.budget()
        if self.activation_symmetric is not None and not self._asks_for_dynamic():
            raise ConfigError(
                f"activation_symmetric={self.activation_symmetric} is about dynamic activations, and there are none; "
                "leave it unset, or take quantization_type='dynamic'"
            )

    def _asks_for_dynamic(self) -> bool:
        return "dynamic" in (self._bits_and_type()[1], *(o.quantization_type for o in self._overrides()))

    def _bits_and_type(self) -> tuple[int, str]:
        default_bits = 8 if self.budget() is None else 4
        bits = default_bits if self.quantization_bits is None else self.quantization_bits
        return bits, self.quantization_type or ("dynamic" if bits == 8 else "weight_only")

    def budget(self) -> Budget | None:
        """What an allocation of bits has to keep to, if one is asked for.

        Raises:
            ConfigError: If two are asked for, or one is no positive number.
        """
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        if not given:
            return None
        if len(given) > 1 or self.backend == "bitsandbytes":
            other = "backend='bitsandbytes'" if len(given) == 1 else list(given)[1]
            raise ConfigError(f"{next(iter(given))} and {other}: give one of them")
        ((name, value),) = given.items()
        if name == "target_size" and isinstance(value, str):
            value = parse_size(value, name=name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value!r}: expected a number above 0")
        return Budget(**{name.removeprefix("target_"): int(value) if name == "target_size" else value})

    def _overrides(self) -> tuple[ModuleOverride, ...]:
        if self.overrides is None:
            return ()
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides={self.overrides!r}: expected a mapping of module pattern to fields")
        return tuple(_read_override(pattern, fields) for pattern, fields in self.overrides.items())

    def resolve(self) -> QuantizationSettings:
        """The settings with every default filled in: the one place where defaults are."""
        self.check()
        bits, quantization_type = self._bits_and_type()
        return QuantizationSettings(
            bits=bits,  # type: ignore[arg-type]
            quantization_type=quantization_type,  # type: ignore[arg-type]
            group_size=self.group_size,
            symmetric=True if self.symmetric is None else self.symmetric,
            activation_symmetric=bool(self.activation_symmetric),
            embedding_bits=8 if self.embedding_bits is None else self.embedding_bits,
            skip_modules=tuple(ModulePattern(pattern) for pattern in self.skip_modules or ()),
            overrides=self._overrides(),
            keep_residual=bool(self.keep_residual),
        )

    @property
    def resolved_algorithm(self) -> str:
        """The algorithm that chooses scales."""
        return self.algorithm or "search"

    def freeze(self, modules: Mapping[str, str], version: str) -> None:
        """Write the decisions down, so that loading repeats none of them."""
        settings = self.resolve()
        self.quantization_bits, self.quantization_type = settings.bits, settings.quantization_type
        self.symmetric, self.embedding_bits = settings.symmetric, settings.embedding_bits
        if self._asks_for_dynamic():  # static layers that fall back to dynamic activations have those of their scheme
            self.activation_symmetric = settings.activation_symmetric
        self.algorithm, self.backend = self.resolved_algorithm, "hfquant"
        self.modules, self.hfquant_version, self.format_version = dict(modules), version, FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The fields for ``config.json``: what is set, without what only matters while loading."""
        fields = super().to_dict()
        hidden = (*LOAD_ONLY_FIELDS, "requested", "resume")
        return {key: value for key, value in fields.items() if value is not None and key not in hidden}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What Transformers copies into the config of a checkpoint that is quantized already."""
        asked = {name: getattr(self, name) for name in USER_FIELDS if getattr(self, name) is not None}
        return {"dequantize": self.dequantize, "requested": asked}

    def check_requested(self) -> None:
        """Compare what a user passed for a quantized checkpoint with what the checkpoint is.

        Raises:
            ConfigError: If a field was asked for that the checkpoint does not have.
        """
        for name, value in self.requested.items():
            if name not in LOAD_ONLY_FIELDS and value != getattr(self, name):
                raise ConfigError(
                    f"{name}={value!r} was asked for, but the checkpoint is quantized already with "
                    f"{name}={getattr(self, name)!r}; load it as it is, or dequantize it first"
                )


def _refuse_unknown(record: dict[str, Any]) -> None:
    if record.pop("quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise ConfigError(f"quant_method: expected {QUANT_METHOD!r}")
    for name in record:
        raise ConfigError(f"{name} is not a field of HfQuantConfig{nearest(name, USER_FIELDS + RECORD_FIELDS)}")


def _read_override(pattern: str, fields: Any) -> ModuleOverride:
    where = f"overrides[{pattern!r}]"
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}={fields!r}: expected a mapping of fields")
    for name, value in fields.items():
        if name == "group_size":
            check_group_size(f"{where}.group_size", value)
        elif name in OVERRIDE_CHOICES:
            check_choice(f"{where}.{name}", value, OVERRIDE_CHOICES[name])
        else:
            raise ConfigError(f"{where}.{name} is not a field{nearest(name, (*OVERRIDE_CHOICES, 'group_size'))}")
    return ModuleOverride(
        ModulePattern(pattern),
        bits=fields.get("quantization_bits"),
        quantization_type=fields.get("quantization_type"),
        group_size=fields.get("group_size"),
        symmetric=fields.get("symmetric"),
    )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Accept ``None`` or one of ``choices``, of the same type (``True`` is not 1).

    Raises:
        ConfigError: Otherwise.
    """
    if value is None or any(type(value) is type(choice) and value == choice for choice in choices):
        return
    allowed = ", ".join(repr(choice) for choice in choices)
    close = nearest(value, tuple(c for c in choices if isinstance(c, str))) if isinstance(value, str) else ""
    raise ConfigError(f"{name}={value!r}: expected {'one of ' if len(choices) > 1 else ''}{allowed}{close}")


def check_integer(name: str, value: Any, smallest: int) -> None:
    """Accept ``None`` or an integer from ``smallest``.

    Raises:
        ConfigError: Otherwise.
    """
    if value is not None and (type(value) is not int or value < smallest):
        raise ConfigError(f"{name}={value!r}: expected an integer from {smallest}")


def check_group_size(name: str, value: Any) -> None:
    """Accept ``None``, -1 or a size from 8 to 65536.

    Raises:
        ConfigError: Otherwise.
    """
    if value is None or (type(value) is int and (value == -1 or 8 <= value <= MAX_GROUP_SIZE)):
        return
    raise ConfigError(f"{name}={value!r}: expected an integer from 8 to {MAX_GROUP_SIZE}, or -1 for one per channel")


def nearest(name: str, known: tuple[str, ...]) -> str:
    """``"; did you mean ...?"`` for a misspelt name, or the known names."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}" if known else ""


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(HfQuantConfig)

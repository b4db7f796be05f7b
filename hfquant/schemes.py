"""The vocabulary: how a weight and an activation are quantized, as frozen values without any torch module.

A ``LayerScheme`` has one spelling, used in ``config.json``, reports and errors:
``int4-g64``, ``int4-channel-asym``, ``int8-channel-dynamic``, ``int8-channel-dynamic-asym``, ``int8-g32-static``,
``int4-g64-residual``.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from hfquant.errors import ConfigError, SchemeError


Bits = Literal[4, 8]
QuantizationType = Literal["dynamic", "static", "weight_only"]

AUTO_GROUP_SIZES = (128, 64, 32, 16)
"""Group sizes an automatic choice considers, largest first."""

SMALL_MODEL_PARAMETERS = 1_000_000_000
"""Up to this many parameters an automatic group is at most 64: small models lose more to coarse groups."""

MAX_GROUP_SIZE = 1 << 16


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: ``x [M, K]`` -> scale ``[1]``."""


@dataclass(frozen=True)
class PerToken:
    """One scale per row of activations: ``x [M, K]`` -> scale ``[M, 1]``."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per output channel: ``weight [N, K]`` -> scale ``[N, 1]``."""


@dataclass(frozen=True)
class PerGroup:
    """One scale per ``group_size`` consecutive inputs: ``weight [N, K]`` -> scale ``[N, K // G]``."""

    group_size: int


@dataclass(frozen=True)
class WeightScheme:
    """How a weight ``[N, K]`` becomes integer codes.

    Attributes:
        bits: Bits per code, 4 or 8.
        group_size: Inputs that share a scale; ``None`` means one scale per output channel.
        symmetric: Without a zero point; ``False`` stores one zero point beside each scale.
    """

    bits: Bits
    group_size: int | None = None
    symmetric: bool = True

    @property
    def granularity(self) -> PerGroup | PerChannel:
        """Which weights share a scale."""
        return PerChannel() if self.group_size is None else PerGroup(self.group_size)

    def groups(self, in_features: int) -> int:
        """Scales in a row of ``in_features`` weights.

        Raises:
            SchemeError: If ``group_size`` does not divide ``in_features``.
        """
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise SchemeError(
                f"in_features={in_features} is not a multiple of group_size={self.group_size}; "
                f"use {fitting_group_sizes(in_features)}"
            )
        return in_features // self.group_size


@dataclass(frozen=True)
class ActivationScheme:
    """INT8 activations: ``dynamic`` (one scale per token, at run time) or static (one stored scale).

    Attributes:
        dynamic: Whether each token gets a scale of its own at run time.
        symmetric: Without a zero point; ``False`` gives each token one beside its scale. Static ones are symmetric.
        bits: Bits per code.
    """

    dynamic: bool
    symmetric: bool = True
    bits: Literal[8] = 8

    def __post_init__(self) -> None:
        if not self.dynamic and not self.symmetric:
            raise SchemeError("static activations have no zero point; use symmetric=True or dynamic=True")

    @property
    def granularity(self) -> PerToken | PerTensor:
        """Which activations share a scale."""
        return PerToken() if self.dynamic else PerTensor()


@dataclass(frozen=True)
class LayerScheme:
    """Everything needed to lay out, run and read one quantized layer.

    Attributes:
        weight: How its weights become codes.
        activation: How its inputs are quantized; ``None`` keeps them in float.
        residual: Whether four more bits of each weight are kept, for fine-tuning: what rounding took from it.
    """

    weight: WeightScheme
    activation: ActivationScheme | None = None
    residual: bool = False

    _PATTERN = re.compile(
        r"int([48])-(?:channel|g([1-9][0-9]{0,5}))(-asym)?(?:-(dynamic(?:-asym)?|static))?(-residual)?"
    )

    def __str__(self) -> str:
        weight = self.weight
        text = f"int{weight.bits}-" + ("channel" if weight.group_size is None else f"g{weight.group_size}")
        text += "" if weight.symmetric else "-asym"
        if self.activation is not None:
            text += "-dynamic" if self.activation.dynamic else "-static"
            text += "" if self.activation.symmetric else "-asym"
        return text + ("-residual" if self.residual else "")

    @classmethod
    def parse(cls, text: str) -> "LayerScheme":
        """Read the spelling that ``str()`` writes.

        Raises:
            SchemeError: If ``text`` is not such a spelling.
        """
        match = cls._PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise SchemeError(
                f"scheme {text!r} is not understood; schemes look like int4-g64, int8-channel-dynamic, int4-g32-asym"
            )
        bits, group, asymmetric, activation, residual = match.groups()
        return cls(
            WeightScheme(
                bits=4 if bits == "4" else 8,
                group_size=int(group) if group else None,
                symmetric=asymmetric is None,
            ),
            None if activation is None else ActivationScheme(activation != "static", not activation.endswith("-asym")),
            residual is not None,
        )

    @property
    def quantization_type(self) -> QuantizationType:
        """The user's word for what happens to activations."""
        if self.activation is None:
            return "weight_only"
        return "dynamic" if self.activation.dynamic else "static"


def make_layer_scheme(
    bits: Bits,
    quantization_type: QuantizationType,
    group_size: int | None,
    symmetric: bool,
    activation_symmetric: bool = True,
) -> LayerScheme:
    """The scheme that the user's words stand for; ``group_size=None`` means per channel.

    ``activation_symmetric`` is about dynamic activations; static ones are symmetric.
    """
    activation = None
    if quantization_type != "weight_only":
        dynamic = quantization_type == "dynamic"
        activation = ActivationScheme(dynamic, activation_symmetric or not dynamic)
    return LayerScheme(WeightScheme(bits, group_size, symmetric), activation)


def automatic_group_size(in_features: int, model_parameters: int) -> int | None:
    """Largest sensible INT4 group that divides ``in_features``; ``None`` (per channel) where none does."""
    largest = 64 if model_parameters <= SMALL_MODEL_PARAMETERS else 128
    for size in AUTO_GROUP_SIZES:
        if size <= largest and in_features % size == 0:
            return size
    return None


def fitting_group_sizes(in_features: int) -> str:
    """The group sizes that divide ``in_features``, as advice for an error message."""
    fitting = [size for size in AUTO_GROUP_SIZES if in_features % size == 0]
    sizes = ", ".join(str(size) for size in fitting)
    return (sizes + " or " if sizes else "") + "-1 (one scale per output channel)"


@dataclass(frozen=True)
class ModulePattern:
    """Names a set of modules: a glob over the full name, or a dotted run of its components.

    ``lm_head``, ``layers.0`` and ``mlp.down_proj`` match wherever those components stand in a
    name; ``model.*.down_proj`` is a glob (``*`` and ``?`` only, so that no pattern is ever slow).
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text or len(self.text) > 256:
            raise ConfigError(f"module pattern {self.text!r} must be a string of 1 to 256 characters")

    def matches(self, name: str) -> bool:
        """Whether the module called ``name`` is meant."""
        if "*" in self.text or "?" in self.text:
            return _glob_match(self.text, name)
        return f".{self.text}." in f".{name}."


def _glob_match(pattern: str, name: str) -> bool:
    """Linear-space glob match: backtracks to the last ``*`` only, so it is at most quadratic."""
    p = n = 0
    star, mark = -1, 0
    while n < len(name):
        if p < len(pattern) and pattern[p] == "*":
            star, mark, p = p, n, p + 1
        elif p < len(pattern) and pattern[p] in ("?", name[n]):
            p, n = p + 1, n + 1
        elif star >= 0:
            mark += 1
            p, n = star + 1, mark
        else:
            return False
    return all(character == "*" for character in pattern[p:])


@dataclass(frozen=True)
class ModuleOverride:
    """What to do differently for the modules that ``pattern`` names; ``None`` fields follow the general settings.

    Attributes:
        pattern: The modules that are meant.
        bits: 4, 8, or 16 to keep them in float.
        quantization_type: Of their activations.
        group_size: Inputs that share a scale; -1 means one scale per output channel.
        symmetric: Without a zero point.
    """

    pattern: ModulePattern
    bits: int | None = None
    quantization_type: QuantizationType | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass(frozen=True)
class QuantizationSettings:
    """What the user asked for, with every default resolved; ``hf/config.py`` makes it.

    Attributes:
        bits: Of linear weights, 4 or 8.
        quantization_type: Of their activations.
        group_size: Inputs that share a scale; -1 means one scale per output channel, ``None`` chooses per layer.
        symmetric: Weights without zero points.
        activation_symmetric: Dynamic activations without zero points.
        embedding_bits: Of the input embedding and the output head: 16 keeps them in float.
        skip_modules: Modules to keep in float.
        overrides: Exceptions; a later one wins.
        keep_residual: Keep what rounding took from linear weights, for fine-tuning.
    """

    bits: Bits
    quantization_type: QuantizationType
    group_size: int | None = None
    symmetric: bool = True
    activation_symmetric: bool = True
    embedding_bits: int = 8
    skip_modules: tuple[ModulePattern, ...] = ()
    overrides: tuple[ModuleOverride, ...] = ()
    keep_residual: bool = False

    def for_module(self, name: str) -> "QuantizationSettings":
        """The settings after the overrides whose pattern matches ``name``; ``bits`` may then be 16."""
        changes: dict[str, object] = {}
        for override in self.overrides:
            if override.pattern.matches(name):
                fields = ("bits", "quantization_type", "group_size", "symmetric")
                changes |= {field: value for field in fields if (value := getattr(override, field)) is not None}
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    def overrides_bits(self, name: str) -> int | None:
        """Bits that an override gives the module ``name``, if any."""
        given = [o.bits for o in self.overrides if o.bits is not None and o.pattern.matches(name)]
        return given[-1] if given else None

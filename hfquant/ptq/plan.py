"""What quantizing a model will take and give, from its shapes alone, before any work."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from hfquant.nn.packed_module import packed_bytes
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.select import Selection, packed_class
from hfquant.ptq.allocate import PROBED_WEIGHTS
from hfquant.ptq.blocks import find_stacks
from hfquant.ptq.sensitivity import SAMPLES


SEARCH_WEIGHT_RATE = 2.0e7
"""Weights a second of the data-free search, in units of ``probe_rate``'s reference machine of 100 GFLOP/s."""

REFERENCE_FLOPS = 1.0e11

WEIGHED_OPTIONS = 4
"""Schemes that are compared for each layer when bits are chosen."""


@dataclass(frozen=True)
class PlannedLayer:
    """One layer before it is quantized.

    Attributes:
        name: Of the module.
        scheme: As in ``int4-g64``.
        weights: How many; 0 if tied.
        bytes: Codes, scales and zero points; 0 if tied.
    """

    name: str
    scheme: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What is going to happen.

    Attributes:
        algorithm: What will choose scales and codes.
        layers: Layers that will be quantized.
        kept: Module -> reason, for layers that stay in float.
        bytes_before: Of all parameters, in the dtype of the files.
        bytes_after: Of all tensors that will be stored, to the byte.
        peak_memory: Estimated bytes while quantizing.
        seconds: Estimated time on this machine.
        calibration_tokens: Tokens the estimate is for; 0 without calibration.
        tokens_per_expert: Module -> tokens that each expert gets if routing is even.
    """

    algorithm: str
    layers: tuple[PlannedLayer, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    peak_memory: int
    seconds: float
    calibration_tokens: int
    tokens_per_expert: Mapping[str, int] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and zero points for each quantized weight."""
        weights = sum(layer.weights for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}

    def __str__(self) -> str:
        schemes: dict[str, int] = {}
        for layer in self.layers:
            schemes[layer.scheme] = schemes.get(layer.scheme, 0) + 1
        lines = [
            f"{self.algorithm}: {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per quantized weight",
            f"about {self.seconds:.0f} s and {self.peak_memory / 1e9:.2f} GB of memory on this machine"
            + (f", {self.calibration_tokens} calibration tokens" if self.calibration_tokens else ""),
            "quantized: " + ", ".join(f"{count} x {scheme}" for scheme, count in schemes.items()),
            *(f"kept: {name}: {reason}" for name, reason in self.kept.items()),
            *(f"{name}: about {tokens} tokens an expert" for name, tokens in self.tokens_per_expert.items()),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Effort:
    """What the estimate needs to know of the run.

    Attributes:
        algorithm: What will choose scales and codes.
        calibrated: Whether the model runs on calibration data.
        tokens: Calibration tokens.
        batch_tokens: Tokens in one batch of learned rounding.
        iterations: Of learned rounding.
        element_size: Bytes of a float weight in memory.
        flops: Measured floating point operations a second.
        process_bytes: Memory of the process before the model is loaded.
        allocated: Layer -> bytes that a budget leaves it on average, for layers whose bits will be chosen.
    """

    algorithm: str
    calibrated: bool
    tokens: int
    batch_tokens: int
    iterations: int
    element_size: int
    flops: float
    process_bytes: int
    allocated: Mapping[str, int] = field(default_factory=dict)


def make_plan(model: nn.Module, selection: Selection, effort: Effort, hidden_size: int) -> Plan:
    """The plan for ``model``, which may be on the meta device.

    Args:
        model: Its shapes count, not its values.
        selection: What will be quantized.
        effort: What the estimate needs to know of the run.
        hidden_size: Values of a hidden state.
    """
    layers = tuple(_planned(name, model, selection, effort.allocated) for name in selection.schemes)
    parameters = {id(p): p.numel() for p in model.parameters()}
    quantized = sum(layer.weights for layer in layers)
    kept_bytes = effort.element_size * (sum(parameters.values()) - quantized)
    after = kept_bytes + sum(layer.bytes for layer in layers)
    before = effort.element_size * sum(parameters.values())
    tokens = effort.tokens if effort.calibrated else 0
    return Plan(
        algorithm=effort.algorithm,
        layers=layers,
        kept=dict(selection.kept),
        bytes_before=before,
        bytes_after=after,
        peak_memory=effort.process_bytes + _memory(model, selection, layers, effort, hidden_size, before, after),
        seconds=_seconds(model, selection, layers, effort),
        calibration_tokens=tokens,
        tokens_per_expert=_tokens_per_expert(model, selection, tokens),
    )


def _planned(name: str, model: nn.Module, selection: Selection, allocated: Mapping[str, int]) -> PlannedLayer:
    module, scheme = model.get_submodule(name), selection.schemes[name]
    target = packed_class(module)
    assert target is not None
    weights = {} if name in selection.ties else target.weights_of(module)
    count = sum(weight.numel for weight in weights.values())
    if name in allocated:
        return PlannedLayer(name, "4 or 8 bits, to be chosen", count, allocated[name])
    return PlannedLayer(name, str(scheme), count, sum(packed_bytes(weight, scheme) for weight in weights.values()))


def _memory(
    model: nn.Module,
    selection: Selection,
    layers: tuple[PlannedLayer, ...],
    effort: Effort,
    hidden_size: int,
    before: int,
    after: int,
) -> int:
    """Bytes on top of the process: the model, hidden states between blocks, and one block's statistics."""
    largest = max((layer.weights for layer in layers), default=0)
    if not effort.calibrated:
        return after + largest * (effort.element_size + 1)
    streams = 3 if effort.algorithm == "signround" else 2
    states = streams * effort.tokens * hidden_size * effort.element_size
    block = _largest_block(model, selection)
    squares = sum(2 * 4 * _inputs(model, name) ** 2 for name in block)
    weights = sum(layer.weights for layer in layers if layer.name in block)
    working = weights * 4 * (10 if effort.algorithm == "signround" else 2) + 6 * 4 * largest
    return before + states + squares + working


def _seconds(model: nn.Module, selection: Selection, layers: tuple[PlannedLayer, ...], effort: Effort) -> float:
    """Products of the passes, second moments and the search, at the measured rate; 1.5 for all that is not those."""
    tables = {n for n in selection.schemes if packed_class(model.get_submodule(n)) is QuantEmbedding}
    weights = sum(layer.weights for layer in layers if layer.name not in tables)
    search = weights / SEARCH_WEIGHT_RATE * REFERENCE_FLOPS / effort.flops
    choosing = 0.0
    if effort.allocated:
        share = min(1.0, len(effort.allocated) * PROBED_WEIGHTS / max(1, weights))
        choosing = share * search * WEIGHED_OPTIONS
        if effort.calibrated:
            choosing += 1.5 * 6 * weights * SAMPLES * effort.batch_tokens / 4 / effort.flops
    if not effort.calibrated:
        return search + choosing
    passes = 4 if effort.algorithm == "signround" else 2
    moments = sum(2 * effort.tokens * _inputs(model, n) ** 2 for n in selection.schemes if n not in tables) / 2
    work = 2.0 * weights * effort.tokens * passes + moments
    if effort.algorithm == "signround":
        work += 6.0 * weights * effort.batch_tokens * effort.iterations
    return 1.5 * work / effort.flops + 4 * search + choosing


def _inputs(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    target = packed_class(module)
    assert target is not None
    return max(weight.in_features for weight in target.weights_of(module).values())


def _largest_block(model: nn.Module, selection: Selection) -> list[str]:
    blocks = [block for stack in find_stacks(model, selection.schemes) for block in stack]
    inside = [[name for name in selection.schemes if name.startswith(f"{block}.")] for block in blocks]
    return max(inside, key=len, default=list(selection.schemes))


def _tokens_per_expert(model: nn.Module, selection: Selection, tokens: int) -> dict[str, int]:
    found = {}
    for name in selection.schemes if tokens else ():
        experts: Any = getattr(model.get_submodule(name), "num_experts", None)
        config: Any = getattr(model, "config", None)
        top_k = getattr(config, "num_experts_per_tok", None)
        if isinstance(experts, int) and isinstance(top_k, int):
            found[name] = tokens * top_k // experts
    return found

"""Layers whose INT8 activations cost too much, and what they take instead (docs/decisions/0014).

In a block, what counts is not how much a layer's own output changes but how much what the block returns does, with all
that passes the layer by: the same noise is lost in a large residual stream and spoils a small one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from hfquant.numerics.affine import choose_row_scale, fake_quantize
from hfquant.numerics.observers import choose_input_scale
from hfquant.ptq.blocks import relative_error
from hfquant.ptq.quantize_matrix import MatrixResult
from hfquant.ptq.smoothquant import round_activations
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.schemes import ActivationScheme, LayerScheme


LOWEST_DB = 15.0
"""INT8 activations are kept where the output of the median token has at least this signal to noise ratio: noise of 3 %
of the signal's energy. Below it a static layer takes dynamic ones, and where those do not reach it either, activations
stay in 16 bit. A token with outliers must not hide what they cost the others, so it is the median and not the sum."""

HARMLESS = 1e-3
"""Static activations that change what the block returns by no more of its energy are kept, whatever the layer's own."""

FALLBACK_PARTS = 20
"""One in so many multiply-adds may be dynamic where static ones were asked for: those of the worst layers."""

PROBE_ROWS = 512
"""Tokens on which the noise in a block's output is measured."""


@dataclass(frozen=True)
class Noise:
    """What INT8 activations of layers that read one tensor change in the output of their block.

    Attributes:
        layers: Their names.
        static: Energy of the change as a share of the output's, mean over tokens, with the static scale.
        dynamic: The same with a scale for each token.
    """

    layers: tuple[str, ...]
    static: float
    dynamic: float


Probe = tuple[Callable[[], Tensor], Tensor | None, Tensor]
"""A call of a block, which rows of it count, and what it returned."""


@torch.no_grad()
def block_noise(
    runs: Sequence[Callable[[], Tensor]],
    masks: Sequence[Tensor | None],
    modules: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    found: Mapping[WeightKey, InputStatistics],
    observer: str,
) -> list[Noise]:
    """Measure the layers of one block that are to have static activations.

    Args:
        runs: Call the float block; the last ones are used, held out from choosing weights as far as those reach.
        masks: Rows of each that count ``[B, T]``; ``None`` means all.
        modules: Float layers of the block, by name.
        schemes: Of all layers.
        found: Statistics of their inputs.
        observer: What chooses static ranges.
    """
    readers: dict[int, list[str]] = {}
    for name in modules:
        statistics = found.get(WeightKey(name, "weight"))
        if statistics is not None and statistics.sample.shape[0] and schemes[name].quantization_type == "static":
            readers.setdefault(id(statistics), []).append(name)
    probes, measured = _probes(runs, masks) if readers else [], []
    for names in readers.values():
        statistics = found[WeightKey(names[0], "weight")]
        scale = choose_input_scale(statistics.sample, statistics.absmax.amax(), observer)
        readings = [modules[name] for name in names]
        static = _change(probes, readings, partial(fake_quantize, scale=scale, bits=8))
        dynamic = _change(probes, readings, _rounded_by_token)
        measured.append(Noise(tuple(names), static, dynamic))
    return measured


def _rounded_by_token(x: Tensor) -> Tensor:
    return fake_quantize(x, choose_row_scale(x), bits=8)


def _probes(runs: Sequence[Callable[[], Tensor]], masks: Sequence[Tensor | None]) -> list[Probe]:
    probes: list[Probe] = []
    for run, mask in zip(reversed(runs), reversed(masks), strict=True):
        probes.append((run, mask, run()))
        if sum(before.shape[:-1].numel() for *_, before in probes) >= PROBE_ROWS:
            break
    return probes


def _change(probes: Sequence[Probe], readers: Sequence[nn.Module], rounded: Callable[[Tensor], Tensor]) -> float:
    """Relative energy of the change in what the block returns when ``readers`` read ``rounded`` inputs."""
    handles = [m.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:])) for m in readers]
    try:
        ratios = []
        for run, mask, before in probes:
            ratio = relative_error(run(), before)
            ratios.append(ratio.flatten() if mask is None else ratio[mask.bool()])
        return float(torch.cat(ratios).mean())
    finally:
        for handle in handles:
            handle.remove()


def worst_layers(
    noise: Sequence[Noise], sizes: Mapping[str, int], schemes: Mapping[str, LayerScheme]
) -> dict[str, Noise]:
    """Static layers that gain most from dynamic activations, from the worst on, as long as the share allows.

    Args:
        noise: What was measured.
        sizes: Weights of each layer that was to be static: its multiply-adds for one token.
        schemes: What the layers have by now.
    """
    left = sum(sizes.values()) // FALLBACK_PARTS
    left -= sum(size for name, size in sizes.items() if schemes[name].quantization_type != "static")
    chosen: dict[str, Noise] = {}
    for entry in sorted(noise, key=lambda n: n.static - n.dynamic, reverse=True):
        names = [name for name in entry.layers if schemes[name].quantization_type == "static"]
        left -= sum(sizes[name] for name in names)
        if left < 0 or entry.dynamic >= entry.static:
            break
        chosen |= dict.fromkeys(names, entry)
    return chosen


def settle_scheme(
    scheme: LayerScheme,
    originals: Mapping[str, Tensor],
    results: Mapping[str, Sequence[MatrixResult]],
    found: Mapping[WeightKey, InputStatistics],
    name: str,
    observer: str,
) -> tuple[LayerScheme, str]:
    """``scheme``, or a gentler one for activations where INT8 ones cost too much; and what to tell the reader.

    Args:
        scheme: What was asked for.
        originals: Float weights ``[N, K]`` by parameter; fused experts keep what was asked for.
        results: Their codes.
        found: Statistics of inputs.
        name: Of the layer.
        observer: What chooses static ranges.
    """
    statistics = found.get(WeightKey(name, "weight"))
    if scheme.activation is None or statistics is None or not statistics.sample.shape[0]:
        return scheme, ""
    dynamic = replace(scheme, activation=ActivationScheme(dynamic=True))
    tried = [scheme, *([] if scheme.activation.dynamic else [dynamic]), replace(scheme, activation=None)]
    (result,) = results["weight"]
    weight, rounded = originals["weight"].float(), result.grid.nearest(result.weight)
    x = statistics.sample
    wanted, ratios = x @ weight.t(), []
    for candidate in tried:
        coarse = round_activations(x, candidate, statistics.absmax.amax(), observer)
        ratios.append(_median_decibels(wanted, coarse @ rounded.t()))
        if ratios[-1] >= LOWEST_DB:
            break
    chosen = max(range(len(ratios)), key=lambda index: (min(ratios[index], LOWEST_DB), -index))
    if chosen == 0:
        return scheme, ""
    given = ", ".join(f"{tried[i].quantization_type} {ratios[i]:.1f} dB" for i in range(chosen))
    kept = f"{tried[chosen].quantization_type} gives {ratios[chosen]:.1f}"
    return tried[chosen], f"activations: {given}, below {LOWEST_DB:g}; {kept}"


def _median_decibels(wanted: Tensor, got: Tensor) -> float:
    """Signal to noise of the median row of ``wanted [S, N]``."""
    signal, noise = wanted.square().sum(-1), (got - wanted).square().sum(-1)
    return float(10 * torch.log10(signal / noise.clamp_min(1e-30)).nanmedian())

"""What became of one layer: measured for the report, and judged where static activations may not do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hfquant.numerics.packing import PackedWeight
from hfquant.ptq.gptq import layer_loss
from hfquant.ptq.quantize_matrix import MatrixResult
from hfquant.ptq.quantize_weight import decibels
from hfquant.ptq.smoothquant import round_activations
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.schemes import ActivationScheme, LayerScheme


LOWEST_DB = 15.0
"""INT8 activations are kept where the output of the median token has at least this signal to noise ratio: noise of 3 %
of the signal's energy. Below it a static layer takes dynamic ones, and where those do not reach it either, activations
stay in 16 bit. A token with outliers must not hide what they cost the others, so it is the median and not the sum."""


@dataclass(frozen=True)
class LayerResult:
    """How one weight matrix was quantized, for the report.

    Attributes:
        name: Of the parameter; with ``[expert]`` behind it where there are several.
        scheme: As in ``int4-g64``.
        method: What its codes come from.
        sqnr_db: Of the weight.
        output_sqnr_db: Of the layer's output on held-out tokens.
        rows: Calibration rows that reached it.
        losses: Method -> squared error of its output on held-out rows.
        note: What a reader should know.
    """

    name: str
    scheme: str
    method: str
    sqnr_db: float
    output_sqnr_db: float | None
    rows: int
    losses: dict[str, float] = field(default_factory=dict)
    note: str = ""


def layer_result(
    name: str, scheme: LayerScheme, result: MatrixResult, original: Tensor, statistics: InputStatistics | None
) -> LayerResult:
    """Measure what became of ``original [N, K]``."""
    weight = original.float()
    error = result.grid.nearest(result.weight) - weight
    output, rows = None, 0
    if statistics is not None and statistics.rows + statistics.held_rows:
        moments, rows = statistics.judging(), statistics.rows + statistics.held_rows
        output = decibels(layer_loss(weight, moments), layer_loss(error, moments))
    sqnr = decibels(float(weight.square().sum()), float(error.square().sum()))
    return LayerResult(name, str(scheme), result.method, sqnr, output, rows, dict(result.losses), result.note)


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


def stacked(parts: list[PackedWeight], *, is_matrix: bool) -> PackedWeight:
    """The packed weights of all experts as one; ``parts[0]`` where there are none."""
    if is_matrix:
        return parts[0]
    zero = None if parts[0].weight_zero_point is None else torch.stack([p.weight_zero_point for p in parts])  # type: ignore[misc]
    return PackedWeight(torch.stack([p.weight for p in parts]), torch.stack([p.weight_scale for p in parts]), zero)

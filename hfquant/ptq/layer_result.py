"""What became of one layer, measured for the report."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfquant.numerics.packing import PackedWeight
from hfquant.ptq.gptq import layer_loss
from hfquant.ptq.quantize_matrix import MatrixResult
from hfquant.ptq.quantize_weight import decibels
from hfquant.ptq.statistics import InputStatistics
from hfquant.schemes import LayerScheme


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


def stacked(parts: list[PackedWeight], *, is_matrix: bool) -> PackedWeight:
    """The packed weights of all experts as one; ``parts[0]`` where there are none."""
    if is_matrix:
        return parts[0]
    zero = None if parts[0].weight_zero_point is None else torch.stack([p.weight_zero_point for p in parts])  # type: ignore[misc]
    return PackedWeight(torch.stack([p.weight for p in parts]), torch.stack([p.weight_scale for p in parts]), zero)

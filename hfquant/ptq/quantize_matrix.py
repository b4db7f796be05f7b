"""One weight matrix to codes, with what is known of its inputs: search, GPTQ, and the guard that picks the better."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfquant.numerics.affine import scale_to_bits, split_groups
from hfquant.numerics.packing import PackedWeight, pack
from hfquant.ptq.gptq import Grid, gptq, layer_loss
from hfquant.ptq.quantize_weight import ALGORITHMS, CHUNK_WEIGHTS
from hfquant.ptq.statistics import InputStatistics
from hfquant.ptq.weighted_search import choose_weighted
from hfquant.schemes import WeightScheme


CALIBRATED = ("gptq", "signround", "awq")
"""Algorithms that look at the inputs of a layer."""

FEWEST_ROWS = 4
"""GPTQ needs at least ``K / FEWEST_ROWS`` rows of inputs; with fewer (a rare expert) the weighted search is kept."""


@dataclass(frozen=True)
class MatrixResult:
    """The codes of one matrix, and how they came about.

    Attributes:
        grid: Scales and zero points.
        weight: What is rounded to the grid ``[N, K]``: the original, or GPTQ's compensated weights.
        method: ``"rtn"``, ``"search"``, ``"weighted"``, ``"gptq"`` or ``"signround"``.
        losses: Method -> squared error of the layer's output on held-out rows, for the methods that were tried.
        note: Anything a reader of the report should know.
    """

    grid: Grid
    weight: Tensor
    method: str
    losses: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def packed(self) -> PackedWeight:
        """What is stored."""
        bits = self.grid.bits
        zero = None if self.grid.zero_point is None else pack(self.grid.zero_point, bits=bits)
        codes = self.grid.codes(self.weight).to(torch.int8)
        return PackedWeight(pack(codes, bits=bits), scale_to_bits(self.grid.scale), zero)


def quantize_matrix(
    weight: Tensor, scheme: WeightScheme, statistics: InputStatistics | None, *, algorithm: str, name: str
) -> MatrixResult:
    """Quantize ``weight [N, K]``, any floating dtype.

    Args:
        weight: The original.
        scheme: Bits, group size, symmetry.
        statistics: Of its inputs; ``None`` if no batch reached it, which leaves the data-free search.
        algorithm: ``"rtn"``, ``"search"``, or one of ``CALIBRATED``.
        name: For errors.

    Raises:
        CalibrationError: If the inputs' second moments cannot be used.
    """
    rows = weight.detach().float()
    unseen = statistics is None or statistics.rows + statistics.held_rows == 0
    if algorithm not in CALIBRATED or unseen:
        plain = algorithm if algorithm not in CALIBRATED else "search"
        note = "no calibration data reached it" if unseen and algorithm in CALIBRATED else ""
        return MatrixResult(_grid(rows, scheme, plain, None), rows, plain, {}, note)
    assert statistics is not None
    importance = (statistics.hessian if statistics.rows else statistics.held_out).diagonal()
    grid = _grid(rows, scheme, "weighted", importance)
    losses = {"weighted": layer_loss(grid.nearest(rows) - rows, statistics.judging())}
    if algorithm == "awq":
        return MatrixResult(grid, rows, "weighted", losses)
    if statistics.rows * FEWEST_ROWS < rows.shape[1]:
        note = f"only {statistics.rows} rows of calibration data reached it"
        return MatrixResult(grid, rows, "weighted", losses, note)
    made = gptq(rows, grid, statistics.hessian, name=name)
    losses["gptq"] = layer_loss(grid.nearest(made.weight) - rows, statistics.judging())
    own = [layer_loss(grid.nearest(w) - rows, statistics.hessian) for w in (made.weight, rows)]
    note = f"damping {made.damping}" if made.damping > 0.01 else ""
    if losses["gptq"] < losses["weighted"] and own[0] <= own[1]:
        return MatrixResult(grid, made.weight, "gptq", losses, note)
    return MatrixResult(grid, rows, "weighted", losses, "GPTQ was worse on held-out rows")


def _grid(rows: Tensor, scheme: WeightScheme, method: str, importance: Tensor | None) -> Grid:
    """The scales that ``method`` chooses, a few rows at a time."""
    size = scheme.group_size or rows.shape[1]
    weights = None if importance is None else split_groups(importance, scheme.group_size)
    scales, zeros = [], []
    for part in rows.split(max(1, CHUNK_WEIGHTS // rows.shape[1])):
        groups = split_groups(part, scheme.group_size)
        if weights is None:
            scale, zero = ALGORITHMS[method](groups, scheme)
        else:
            scale, zero = choose_weighted(groups, scheme, weights)
        scales.append(scale)
        zeros.append(zero)
    zero_point = None if scheme.symmetric else torch.cat([zero for zero in zeros if zero is not None])
    return Grid(torch.cat(scales), zero_point, size, scheme.bits)

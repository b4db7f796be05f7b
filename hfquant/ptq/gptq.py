"""GPTQ on scales that are fixed beforehand, with static activation order.

Minimises ``tr((W - Q) H (W - Q)^T)``: columns are rounded one by one, and what each rounding costs is made up for by
the columns that are not rounded yet. Columns go in order of falling ``H_ii``; every group keeps the scale that was
chosen for it before, so the result needs no permutation at run time.

References:
    Frantar et al. 2022, algorithm 1. https://arxiv.org/abs/2210.17323
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfquant.errors import CalibrationError
from hfquant.numerics.affine import code_range


DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Tried in turn, as a share of the mean of the diagonal, until the Hessian can be factorised."""

COLUMNS = 128
"""Columns whose compensation is applied to the rest at once."""


@dataclass(frozen=True)
class Grid:
    """The grid of one weight matrix, a scale for every column of every row.

    Attributes:
        scale: ``[N, K // G]``, float32.
        zero_point: ``[N, K // G]``, int8, or ``None``.
        group_size: G.
        bits: Bits per code.
    """

    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    bits: int

    def nearest(self, weight: Tensor) -> Tensor:
        """Values on the grid nearest to ``weight [N, K]``."""
        codes = self.codes(weight)
        shift = 0 if self.zero_point is None else self.expanded(self.zero_point).float()
        return (codes - shift) * self.expanded(self.scale)

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes ``[N, K]`` as float32, zero point included."""
        shift = 0 if self.zero_point is None else self.expanded(self.zero_point).float()
        return (torch.round(weight / self.expanded(self.scale)) + shift).clamp(*code_range(self.bits))

    def expanded(self, values: Tensor) -> Tensor:
        """``values [N, K // G]`` for every column, ``[N, K]``."""
        return values.repeat_interleave(self.group_size, dim=1)


@dataclass(frozen=True)
class Compensated:
    """What GPTQ made of a weight.

    Attributes:
        weight: ``[N, K]``: each column as it was when its turn came. Rounding it to the grid gives GPTQ's codes.
        damping: The share of the mean diagonal that was added.
        dead: Inputs that were always zero.
    """

    weight: Tensor
    damping: float
    dead: int


def layer_loss(error: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T)`` of an error ``[N, K]`` under moments ``[K, K]``: the squared error of the layer's output."""
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def inverse_factor(hessian: Tensor, name: str) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped ``hessian [K, K]``, and the damping it took.

    Raises:
        CalibrationError: If no damping makes it positive definite.
    """
    mean = float(hessian.diagonal().mean())
    for damping in DAMPING:
        damped = hessian.double() if damping > DAMPING[0] else hessian.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper.float(), damping
    raise CalibrationError(
        f"{name}: its inputs give no usable second moments (mean square {mean:.3g}), even damped; give more or more "
        "varied calibration data, or put the layer into skip_modules"
    )


@torch.no_grad()
def gptq(weight: Tensor, grid: Grid, hessian: Tensor, *, name: str) -> Compensated:
    """Compensated weights whose nearest codes on ``grid`` minimise the layer's loss.

    Args:
        weight: ``[N, K]``, float32.
        grid: Scales and zero points, fixed.
        hessian: ``sum x x^T [K, K]``, float32.
        name: Of the layer, for errors.

    Raises:
        CalibrationError: If ``hessian`` cannot be used.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    sorted_hessian = hessian[order][:, order]
    dead = sorted_hessian.diagonal() == 0
    sorted_hessian.diagonal()[dead] = 1.0
    factor, damping = inverse_factor(sorted_hessian, name)
    # Transposed, so that a column is contiguous.
    columns = weight[:, order].t().contiguous()
    scales = grid.expanded(grid.scale)[:, order].t().contiguous()
    zeros = None if grid.zero_point is None else grid.expanded(grid.zero_point)[:, order].t().float().contiguous()
    done = torch.empty_like(columns)
    for start in range(0, columns.shape[0], COLUMNS):
        stop = min(start + COLUMNS, columns.shape[0])
        errors = _round_columns(columns, scales, zeros, factor, done, start, stop, grid.bits)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    restored = torch.empty_like(weight)
    restored[:, order] = done.t()
    return Compensated(restored, damping, int(dead.sum()))


def _round_columns(
    columns: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    factor: Tensor,
    done: Tensor,
    start: int,
    stop: int,
    bits: int,
) -> Tensor:
    """Round columns ``start`` to ``stop`` one by one; their scaled errors ``[stop - start, N]``."""
    smallest, largest = code_range(bits)
    errors = torch.empty(stop - start, columns.shape[1], device=columns.device)
    for index in range(start, stop):
        column, scale = columns[index], scales[index]
        done[index] = column
        steps = (column / scale).round_()
        if zeros is None:
            steps.clamp_(smallest, largest)
        else:
            steps = steps.add_(zeros[index]).clamp_(smallest, largest).sub_(zeros[index])
        error = steps.mul_(scale).neg_().add_(column).div_(factor[index, index])
        errors[index - start] = error
        if index + 1 < stop:
            columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error, alpha=-1)
    return errors

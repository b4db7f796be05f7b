"""Activation-weighted search: the scale of each group that minimises ``sum_i H_ii (w_i - Q(w_i))^2``.

``H_ii`` is the mean square of input ``i`` over the calibration data: an error where inputs are large costs more. This
is the diagonal of the layer's true loss ``tr(E H E^T)`` (Frantar et al. 2022, eq. 1), which is cheap enough to search.
"""

import torch
from torch import Tensor

from hfquant.numerics.affine import code_range, round_scale
from hfquant.ptq.rtn import choose_rtn
from hfquant.schemes import WeightScheme


RATIOS = tuple(0.01 * step for step in range(70, 106, 2))
"""Tried around the scale that puts the largest weight of a group on the outermost level."""


def choose_weighted(groups: Tensor, scheme: WeightScheme, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group with the least weighted error.

    Args:
        groups: Weights ``[N, K // G, G]``, float32.
        scheme: Bits, and whether there is a zero point. 8 bits take round to nearest: a search changes nothing there.
        importance: ``H_ii [K // G, G]``, float32, not negative.

    Returns:
        Scale ``[N, K // G]``, float32, of either sign if symmetric, and zero point, int8, ``None`` if symmetric.
    """
    if scheme.bits == 8:
        return choose_rtn(groups, scheme)
    best: tuple[Tensor, Tensor | None, Tensor] | None = None
    for scale, zero_point in _candidates(groups, scheme):
        error = _weighted_error(groups, scale, zero_point, importance, scheme.bits)
        if best is None:
            best = scale, zero_point, error
            continue
        better = error < best[2]
        zero = None if zero_point is None or best[1] is None else torch.where(better, zero_point, best[1])
        best = torch.where(better, scale, best[0]), zero, torch.where(better, error, best[2])
    assert best is not None
    return best[0], best[1]


def _candidates(groups: Tensor, scheme: WeightScheme) -> "list[tuple[Tensor, Tensor | None]]":
    smallest, largest = code_range(scheme.bits)
    low, high = groups.aminmax(dim=-1)
    if scheme.symmetric:
        extreme = torch.where(high > -low, high, low) / smallest
        return [(round_scale(sign * extreme * ratio), None) for ratio in RATIOS for sign in (1, -1)]
    low, high = low.clamp_max(0), high.clamp_min(0)
    candidates: list[tuple[Tensor, Tensor | None]] = []
    for ratio in RATIOS:
        scale = round_scale((high - low) / (largest - smallest) * ratio)
        zero_point = (smallest - torch.round(low / scale)).clamp(smallest, largest)
        candidates.append((scale, zero_point.to(torch.int8)))
    return candidates


def _weighted_error(groups: Tensor, scale: Tensor, zero_point: Tensor | None, importance: Tensor, bits: int) -> Tensor:
    smallest, largest = code_range(bits)
    step = scale.unsqueeze(-1)
    values = (groups / step).round_()
    if zero_point is None:
        values.clamp_(smallest, largest)
    else:
        shift = zero_point.unsqueeze(-1).float()
        values.clamp_(smallest - shift, largest - shift)
    error: Tensor = values.mul_(step).sub_(groups).square_().mul_(importance).sum(-1)
    return error

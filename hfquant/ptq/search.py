"""Data-free search: the scale of each group that minimises its squared error, among those that clip almost nothing.

The largest weight of a group lies on the outermost level, -8, which has no counterpart at +8: a scale of either sign
puts it there whatever the weight's sign, so all 16 levels are used. Around that scale a few ratios are tried.

Why not a wider search: scales that clip the largest weight lower the squared error and raise the perplexity. The
measurements are in docs/decisions/0007-data-free-search.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hfquant.numerics.affine import code_range, round_scale
from hfquant.ptq.rtn import choose_rtn
from hfquant.schemes import WeightScheme


RATIOS = (0.96, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03, 1.04)
"""Tried around the scale that puts the largest weight on the outermost level."""


def choose_by_search(groups: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group with the least squared error.

    Args:
        groups: Weights ``[..., G]``, float32.
        scheme: Bits, and whether there is a zero point. With 8 bits a search changes nothing that can be measured, so
            the result is that of round to nearest.

    Returns:
        Scale ``[...]`` float32, of either sign if symmetric, and zero point ``[...]`` int8, ``None`` if symmetric.
    """
    if scheme.bits == 8:
        return choose_rtn(groups, scheme)
    best_scale, best_zero, best_error = torch.empty(0), None, None
    for scale, zero_point in _candidates(groups, scheme):
        error = _squared_error(groups, scale, zero_point, scheme.bits)
        if best_error is None:
            best_scale, best_zero, best_error = scale, zero_point, error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero_point is not None and best_zero is not None:
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _candidates(groups: Tensor, scheme: WeightScheme) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scale and zero point for each ratio."""
    smallest, largest = code_range(scheme.bits)
    low, high = groups.aminmax(dim=-1)
    if scheme.symmetric:
        extreme = torch.where(high > -low, high, low) / smallest
        for ratio in RATIOS:
            yield round_scale(extreme * ratio), None
        return
    low, high = low.clamp_max(0), high.clamp_min(0)
    for ratio in RATIOS:
        scale = round_scale((high - low) / (largest - smallest) * ratio)
        zero_point = (smallest - torch.round(low / scale)).clamp(smallest, largest)
        yield scale, zero_point.to(torch.int8)


def _squared_error(groups: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Sum over each group of ``(x - dequantize(quantize(x)))**2``, in place and without the codes."""
    smallest, largest = code_range(bits)
    step = scale.unsqueeze(-1)
    values = (groups / step).round_()
    if zero_point is None:
        values.clamp_(smallest, largest)
    else:
        shift = zero_point.unsqueeze(-1).float()
        values.clamp_(smallest - shift, largest - shift)
    values.mul_(step).sub_(groups)
    error: Tensor = torch.linalg.vecdot(values, values)
    return error

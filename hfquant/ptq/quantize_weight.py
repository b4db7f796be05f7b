"""A float weight to packed codes, a few rows at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfquant.errors import SchemeError
from hfquant.numerics.affine import dequantize, quantize, scale_to_bits, split_groups
from hfquant.numerics.packing import PackedWeight, pack, packed_length
from hfquant.ptq.rtn import choose_rtn
from hfquant.ptq.search import choose_by_search
from hfquant.schemes import WeightScheme


ScaleChooser = Callable[[Tensor, WeightScheme], tuple[Tensor, Tensor | None]]

ALGORITHMS: dict[str, ScaleChooser] = {"rtn": choose_rtn, "search": choose_by_search}
"""What chooses the scale of each group, by the name users give."""

CHUNK_WEIGHTS = 1 << 20
"""Weights in float32 at a time: bounds the memory above the packed result to some tens of megabytes."""


@dataclass(frozen=True)
class QuantizedWeight:
    """Packed codes and how well they stand for the original.

    Attributes:
        packed: What is stored.
        sqnr_db: Signal to quantization noise ratio in decibels; infinite when nothing was lost.
    """

    packed: PackedWeight
    sqnr_db: float


def quantize_weight(weight: Tensor, scheme: WeightScheme, *, algorithm: str, name: str) -> QuantizedWeight:
    """Quantize ``weight`` with the scale that ``algorithm`` chooses for each group.

    Args:
        weight: ``[..., N, K]``, any floating dtype.
        scheme: Bits, group size, symmetry.
        algorithm: A key of ``ALGORITHMS``.
        name: Of the parameter, for errors.

    Raises:
        SchemeError: If ``weight`` holds NaN or infinity.
    """
    rows = weight.detach().reshape(-1, weight.shape[-1])
    device, bits, groups = rows.device, scheme.bits, scheme.groups(rows.shape[-1])
    words = torch.empty(rows.shape[0], packed_length(rows.shape[-1], bits), dtype=torch.int32, device=device)
    scales = torch.empty(rows.shape[0], groups, dtype=torch.int16, device=device)
    zero_points = torch.empty(rows.shape[0], packed_length(groups, bits), dtype=torch.int32, device=device)
    signal = noise = 0.0
    step = max(1, CHUNK_WEIGHTS // max(1, rows.shape[-1]))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        values = split_groups(rows[part].float(), scheme.group_size)
        check_finite(values, name)
        scale, zero_point = ALGORITHMS[algorithm](values, scheme)
        shift = None if zero_point is None else zero_point.unsqueeze(-1)
        codes = quantize(values, scale.unsqueeze(-1), shift, bits=bits)
        words[part] = pack(codes.flatten(-2), bits=bits)
        scales[part] = scale_to_bits(scale)
        if zero_point is not None:
            zero_points[part] = pack(zero_point, bits=bits)
        error = dequantize(codes, scale.unsqueeze(-1), shift) - values
        signal += float(values.square().sum(dtype=torch.float64))
        noise += float(error.square().sum(dtype=torch.float64))
    packed = PackedWeight(words, scales, None if scheme.symmetric else zero_points)
    shaped = [None if tensor is None else tensor.view(*weight.shape[:-1], -1) for tensor in packed]
    return QuantizedWeight(PackedWeight(*shaped), decibels(signal, noise))  # type: ignore[arg-type]


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise."""
    if noise == 0:
        return float("inf")
    return 10 * math.log10(signal / noise) if signal > 0 else float("-inf")


def check_finite(values: Tensor, name: str) -> None:
    """Refuse a weight that has no codes.

    Raises:
        SchemeError: If ``values`` holds NaN or infinity.
    """
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise SchemeError(
            f"{name}: {bad} weights are NaN or infinite and have no code; repair the model, or add the module to "
            "skip_modules"
        )

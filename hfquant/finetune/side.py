"""Merging an adapter that stands beside a packed weight: rounding the sum back onto the grid, and what that costs.

    codes' = clamp(round((dequantize(codes) + residual + update) / scale) + zero_point)

Scales and zero points stay. Where PTQ kept what rounding took from each weight (``keep_residual=True``), it is counted
in, and about ``|update| / step`` of the codes change. Without it a weight whose update is below half a step keeps its
code, and an adapter as small as that is lost; so the share of the update that survived is measured.
``adapter="grid"`` trains inside the rounding, and loses nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfquant.errors import SchemeError
from hfquant.numerics.affine import dequantize, quantize, scale_from_bits, split_groups
from hfquant.numerics.packing import PackedWeight, pack, unpack


@dataclass(frozen=True)
class MergeRecord:
    """What rounding one merged weight back onto its grid cost.

    Attributes:
        weights: Weights of the layer.
        codes_changed: Codes that differ from those before the merge.
        wanted: Squared norm of the update, in units of the weight squared.
        achieved: Inner product of the change that was achieved with the update.
        lost: Squared norm of the difference of the two.
    """

    weights: int
    codes_changed: int
    wanted: float
    achieved: float
    lost: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge cost, over all packed layers.

    Attributes:
        layers: Packed layers that took an update.
        weights: Their weights.
        codes_changed: Codes that differ from those before the merge.
        survived: Share of the update that is in the merged weights: the change that was achieved, projected on the
            update; 1 is all of it, and 0 none.
        error: Norm of what rounding took from the update or added to it, relative to the update.
        loss_before: Mean loss with the adapter beside the weights, if data was given.
        loss_after: Mean loss of the merged model on the same data.
    """

    layers: int
    weights: int
    codes_changed: int
    survived: float
    error: float
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def changed_share(self) -> float:
        """Share of the codes that changed, from 0 to 1."""
        return self.codes_changed / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        text = (
            f"{self.layers} layers merged: {100 * self.changed_share:.2f} % of the codes changed, "
            f"{100 * self.survived:.1f} % of the update survived the rounding (error {100 * self.error:.0f} % of it)"
        )
        if self.loss_before is None or self.loss_after is None:
            return text
        return f"{text}, loss {self.loss_before:.4f} -> {self.loss_after:.4f}"


def merge_report(records: Iterable[MergeRecord]) -> MergeReport:
    """The sum of the layers' records."""
    found = list(records)
    wanted = sum(record.wanted for record in found)
    return MergeReport(
        layers=len(found),
        weights=sum(record.weights for record in found),
        codes_changed=sum(record.codes_changed for record in found),
        survived=sum(record.achieved for record in found) / wanted if wanted else 1.0,
        error=(sum(record.lost for record in found) / wanted) ** 0.5 if wanted else 0.0,
    )


def round_onto_grid(
    packed: PackedWeight, target: Tensor, *, bits: int, name: str, residual: Tensor | None = None
) -> tuple[Tensor, MergeRecord]:
    """The codes that are nearest to ``target`` on the grid of ``packed``.

    Args:
        packed: The weight before, ``[..., N, K]``.
        target: What it should be, ``[..., N, K]``, float32.
        bits: Bits per code.
        name: Of the layer, for errors.
        residual: What rounding took from the weight before, packed with 4 bits, to count in; ``None`` counts nothing.

    Returns:
        Packed codes ``[..., N, W]`` (int32), and what the rounding cost.

    Raises:
        SchemeError: If ``target`` is not finite: the adapter is broken.
    """
    if not torch.isfinite(target).all():
        raise SchemeError(f"{name}: the adapter makes NaN or infinite weights, which have no codes; it is not merged")
    scale, inputs = scale_from_bits(packed.weight_scale), target.shape[-1]
    groups = scale.shape[-1]
    zero = packed.weight_zero_point
    if zero is not None:
        zero = unpack(zero, bits=bits, length=groups).unsqueeze(-1)
    grid, size = (scale.unsqueeze(-1), zero), inputs // groups
    codes, wanted = (split_groups(t, size) for t in (unpack(packed.weight, bits=bits, length=inputs), target))
    taken = 0.0 if residual is None else residual_values(residual, packed.weight_scale, inputs)
    found = quantize(wanted + taken, *grid, bits=bits)
    before = dequantize(codes, *grid)
    update, change = wanted - before, dequantize(found, *grid) - before
    record = MergeRecord(
        weights=codes.numel(),
        codes_changed=int((found != codes).sum()),
        wanted=_dot(update, update),
        achieved=_dot(change, update),
        lost=_dot(change - update, change - update),
    )
    return pack(found.view(target.shape), bits=bits), record


def residual_values(residual: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """What rounding took from a weight, in its units.

    Args:
        residual: Packed with 4 bits ``[..., N, ceil(K / 8)]``, int32.
        weight_scale: Bit patterns of the scales ``[..., N, K // G]``, int16.
        in_features: K.

    Returns:
        Values in groups ``[..., N, K // G, G]``, float32.
    """
    steps = unpack(residual, bits=4, length=in_features).float() / 16
    return split_groups(steps, in_features // weight_scale.shape[-1]) * scale_from_bits(weight_scale).unsqueeze(-1)


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))

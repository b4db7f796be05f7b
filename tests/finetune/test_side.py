"""Rounding a merged weight back onto its grid."""

import pytest
import torch
from torch import Tensor

from hfquant import SchemeError
from hfquant.finetune.side import MergeRecord, merge_report, round_onto_grid
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.packing import PackedWeight, unpack
from tests.support.linear_case import LinearCase


CASES = [(4, 32, True), (4, 32, False), (4, None, True), (8, 32, True), (8, None, False)]


def case(bits: int, group: int | None, symmetric: bool) -> tuple[PackedWeight, Tensor]:
    """A random packed weight ``[9, 96]``, and what it stands for."""
    found = LinearCase(1, 96, 9, bits, group, symmetric)
    return PackedWeight(*found.packed), found.weight.float()


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_without_an_update_no_code_changes(bits: int, group: int | None, symmetric: bool) -> None:
    packed, values = case(bits, group, symmetric)
    codes, record = round_onto_grid(packed, values, bits=bits, name="layer")
    assert torch.equal(codes, packed.weight)
    assert record == MergeRecord(weights=9 * 96, codes_changed=0, wanted=0.0, achieved=0.0, lost=0.0)


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_codes_are_the_nearest_of_all(bits: int, group: int | None, symmetric: bool) -> None:
    packed, values = case(bits, group, symmetric)
    target = values + 0.1 * torch.randn_like(values)
    codes, record = round_onto_grid(packed, target, bits=bits, name="layer")
    grid = grid_values(packed, bits)
    found = unpack(codes, bits=bits, length=96).long() + (1 << (bits - 1))
    chosen = grid.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    least = (grid - target.double().unsqueeze(-1)).abs().amin(-1)
    assert float(((chosen - target.double()).abs() - least).max()) < 1e-6
    before = unpack(packed.weight, bits=bits, length=96)
    changed = found - (1 << (bits - 1)) != before
    assert record.codes_changed == int(changed.sum()) > 0
    update, change = (target - values).double(), chosen - values.double()
    assert record.wanted == pytest.approx(float((update * update).sum()), rel=1e-4)
    assert record.achieved == pytest.approx(float((change * update).sum()), rel=1e-4)
    assert record.lost == pytest.approx(float((change - update).square().sum()), rel=1e-3)


def grid_values(packed: PackedWeight, bits: int) -> Tensor:
    """Every value each weight could have, ``[N, K, 2**bits]``, float64."""
    scale = scale_from_bits(packed.weight_scale).double()
    size = 96 // scale.shape[-1]
    zero = torch.zeros_like(scale)
    if packed.weight_zero_point is not None:
        zero = unpack(packed.weight_zero_point, bits=bits, length=scale.shape[-1]).double()
    steps = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).double()
    values = (steps - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    return values.repeat_interleave(size, 1)


def test_an_update_below_half_a_step_is_lost_and_reported() -> None:
    packed, values = case(4, 32, True)
    step = scale_from_bits(packed.weight_scale).abs().repeat_interleave(32, 1)
    codes, record = round_onto_grid(packed, values + 0.4 * step, bits=4, name="layer")
    assert torch.equal(codes, packed.weight)
    report = merge_report([record])
    assert (report.survived, report.error, report.changed_share) == (0.0, pytest.approx(1.0), 0.0)


def test_what_is_not_finite_is_refused() -> None:
    packed, values = case(4, 32, True)
    values[3, 5] = float("nan")
    with pytest.raises(SchemeError, match=r"model\.layer: the adapter makes NaN"):
        round_onto_grid(packed, values, bits=4, name="model.layer")


def test_reports_add_up() -> None:
    records = [MergeRecord(100, 10, wanted=3.0, achieved=3.0, lost=0.0), MergeRecord(300, 30, 1.0, 0.0, 1.0)]
    report = merge_report(records)
    assert (report.layers, report.weights, report.codes_changed) == (2, 400, 40)
    assert (report.survived, report.error, report.changed_share) == (0.75, 0.5, 0.1)
    assert "10.00 % of the codes changed, 75.0 % of the update survived" in str(report)
    assert merge_report([]).survived == 1.0

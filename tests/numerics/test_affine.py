import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hfquant.errors import SchemeError
from hfquant.numerics import affine
from hfquant.numerics.metrics import sqnr_db
from tests.support.tolerance import ASYMMETRIC_SQNR_FLOORS_DB, SQNR_FLOORS_DB


BF16_HALF_ULP = 2.0**-8
"""Largest relative error of rounding to bfloat16, and a little."""

seeds = st.integers(0, 2**16)
bits_of = st.sampled_from([4, 8])
magnitudes = st.sampled_from([1e-40, 1e-30, 1e-6, 1.0, 1e4, 1e30])
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.lists(any_float, min_size=4, max_size=4)


def groups(seed: int, magnitude: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(6, 3, 16, generator=generator) + shift) * magnitude


def assert_usable(scale: Tensor) -> None:
    assert bool(torch.isfinite(scale).all())
    assert bool((scale.abs() >= affine.SMALLEST_SCALE).all())
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(affine.scale_from_bits(affine.scale_to_bits(scale)), scale)


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, magnitudes)
def test_rounding_error_is_at_most_half_a_step_and_what_is_clipped(seed: int, bits: int, magnitude: float) -> None:
    x = groups(seed, magnitude)
    scale = affine.choose_scale(x, bits=bits).unsqueeze(-1)
    low, high = affine.code_range(bits)
    beyond = torch.maximum(x - high * scale, low * scale - x).clamp_min(0)
    error = (x - affine.fake_quantize(x, scale, bits=bits)).abs()
    assert bool((error <= torch.maximum(0.5 * scale, beyond) * (1 + 1e-5)).all())
    # The largest value is on the edge of the grid, up to what rounding the scale to bfloat16 loses.
    edge = affine.absmax_divisor(bits)
    assert bool((beyond <= scale * (edge * (1 + BF16_HALF_ULP) - high)).all())


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, magnitudes)
def test_scales_are_usable_and_zeros_have_codes_of_zero(seed: int, bits: int, magnitude: float) -> None:
    x = groups(seed, magnitude)
    x[0] = 0
    symmetric = affine.choose_scale(x, bits=bits)
    scale, zero_point = affine.choose_scale_and_zero_point(x, bits=bits)
    for chosen in (symmetric, scale):
        assert_usable(chosen)
        assert bool((chosen > 0).all())
        assert bool((chosen[0] == 1).all())
    assert bool((affine.quantize(x, symmetric.unsqueeze(-1), bits=bits)[0] == 0).all())
    values = affine.fake_quantize(x, scale.unsqueeze(-1), zero_point.unsqueeze(-1), bits=bits)
    assert bool((values[0] == 0).all())


@settings(deadline=None, max_examples=200)
@given(rows, bits_of)
def test_no_finite_row_breaks_the_grid(values: list[float], bits: int) -> None:
    x = torch.tensor([values])
    low, high = affine.code_range(bits)
    scale, zero_point = affine.choose_scale_and_zero_point(x, bits=bits)
    for chosen, shift in ((affine.choose_scale(x, bits=bits), None), (scale, zero_point.unsqueeze(-1))):
        assert_usable(chosen)
        codes = affine.quantize(x, chosen.unsqueeze(-1), shift, bits=bits)
        assert codes.dtype == torch.int8
        assert low <= int(codes.min()) <= int(codes.max()) <= high
        assert not bool(affine.dequantize(codes, chosen.unsqueeze(-1), shift).isnan().any())


@settings(deadline=None, max_examples=200)
@given(any_float)
def test_round_scale_is_the_nearest_usable_bfloat16(value: float) -> None:
    rounded = affine.round_scale(torch.tensor(value))
    assert_usable(rounded)
    if affine.SMALLEST_SCALE <= abs(value) <= affine.LARGEST_SCALE:
        assert abs(float(rounded) - value) <= 2.0**-9 * 2.0 ** (math.floor(math.log2(abs(value))) + 1)
        assert math.copysign(1, float(rounded)) == math.copysign(1, value)


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, st.sampled_from(["positive", "negative", "asymmetric"]))
def test_codes_survive_a_second_rounding(seed: int, bits: int, grid: str) -> None:
    x, zero_point = groups(seed, shift=0.5), None
    scale = affine.choose_scale(x, bits=bits).unsqueeze(-1) * (-1 if grid == "negative" else 1)
    if grid == "asymmetric":
        scale, zero_point = (t.unsqueeze(-1) for t in affine.choose_scale_and_zero_point(x, bits=bits))
    codes = affine.quantize(x, scale, zero_point, bits=bits)
    values = affine.dequantize(codes, scale, zero_point)
    assert torch.equal(affine.quantize(values, scale, zero_point, bits=bits), codes)
    assert torch.equal(affine.fake_quantize(x, scale, zero_point, bits=bits), values)


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_scale_only(seed: int, bits: int, exponent: int) -> None:
    x = groups(seed)
    scale, shifted = affine.choose_scale(x, bits=bits), affine.choose_scale(x * 2.0**exponent, bits=bits)
    assert torch.equal(scale * 2.0**exponent, shifted)
    codes = affine.quantize(x, scale.unsqueeze(-1), bits=bits)
    assert torch.equal(affine.quantize(x * 2.0**exponent, shifted.unsqueeze(-1), bits=bits), codes)


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, st.sampled_from([-100.0, -3.0, 0.0, 0.5, 3.0, 100.0]))
def test_asymmetric_grids_hold_zero_and_the_range(seed: int, bits: int, shift: float) -> None:
    x = groups(seed, shift=shift)
    scale, zero_point = (t.unsqueeze(-1) for t in affine.choose_scale_and_zero_point(x, bits=bits))
    assert bool((affine.fake_quantize(torch.zeros_like(x), scale, zero_point, bits=bits) == 0).all())
    error = (x - affine.fake_quantize(x, scale, zero_point, bits=bits)).abs()
    # Half a step of the value, half a step of the zero point, and the far end of a range whose scale was rounded.
    far_end = ((1 << bits) - 1) * BF16_HALF_ULP / 2
    assert bool((error <= scale * (0.5 + 0.5 + far_end)).all())


def test_ties_go_to_even_and_codes_are_clamped() -> None:
    x = torch.tensor([-100.0, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5, 100.0])
    codes = affine.quantize(x, torch.tensor(1.0), bits=4)
    assert codes.tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 7, 7]
    assert affine.quantize(x, torch.tensor(-1.0), bits=4).tolist() == [7, 7, 2, 2, 0, 0, -2, -2, -8, -8]
    # The zero point is added after rounding: it does not change which way a tie goes.
    assert affine.quantize(x, torch.tensor(1.0), torch.tensor(-3), bits=4).tolist() == [-8] * 2 + [
        -5,
        -5,
        -3,
        -3,
        -1,
        -1,
        5,
        7,
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_permuting_rows_permutes_codes(bits: int) -> None:
    x, order = groups(0), torch.tensor([3, 1, 5, 0, 2, 4])
    scale = affine.choose_scale(x, bits=bits)
    codes = affine.quantize(x, scale.unsqueeze(-1), bits=bits)
    assert torch.equal(affine.choose_scale(x[order], bits=bits), scale[order])
    assert torch.equal(affine.quantize(x[order], scale[order].unsqueeze(-1), bits=bits), codes[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, scale = groups(1).to(dtype), torch.tensor(0.1).bfloat16().float()
    codes = affine.quantize(x, scale, bits=8)
    assert torch.equal(codes, affine.quantize(x.float(), scale, bits=8))
    exact = codes.double() * scale.double()
    assert torch.equal(affine.dequantize(codes, scale, dtype=dtype), exact.float().to(dtype))
    assert affine.fake_quantize(x, scale, bits=8).dtype == dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.0, 1.0), (-0.0, 1.0), (1e-45, 2.0**-126), (-1e-45, -(2.0**-126)), (-0.5, -0.5), (1 + 2**-8, 1.0)],
)
def test_round_scale(given: float, expected: float) -> None:
    assert float(affine.round_scale(torch.tensor(given))) == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_round_scale_never_overflows(sign: int) -> None:
    largest = torch.tensor(sign * torch.finfo(torch.float32).max)
    assert float(affine.round_scale(largest)) == sign * affine.LARGEST_SCALE


def test_row_scale_is_absmax_over_127() -> None:
    x = torch.tensor([[1.0, -254.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    scale = affine.choose_row_scale(x).flatten()
    assert scale[:2].tolist() == [2.0, 1.0]
    assert bool(scale[2].isnan())
    assert not bool(scale[3].isfinite())
    assert affine.choose_row_scale(torch.empty(2, 0)).tolist() == [[1.0], [1.0]]
    assert affine.choose_row_scale(torch.empty(0, 2)).shape == (0, 1)


def test_groups_are_consecutive() -> None:
    x = torch.arange(24).view(2, 12)
    assert affine.split_groups(x, 4)[1, 2].tolist() == [20, 21, 22, 23]
    assert affine.split_groups(x, None).shape == (2, 1, 12)


@pytest.mark.parametrize("size", [0, 5, 7, 32])
def test_groups_must_divide(size: int) -> None:
    with pytest.raises(SchemeError, match="does not split"):
        affine.split_groups(torch.zeros(2, 16), size)


@pytest.mark.parametrize(("bits", "group"), SQNR_FLOORS_DB, ids=str)
def test_signal_to_noise_of_round_to_nearest(bits: int, group: int | None) -> None:
    x = affine.split_groups(torch.randn(256, 4096), group)
    approximation = affine.fake_quantize(x, affine.choose_scale(x, bits=bits).unsqueeze(-1), bits=bits)
    assert sqnr_db(x, approximation) >= SQNR_FLOORS_DB[bits, group]


@pytest.mark.parametrize(("bits", "group"), ASYMMETRIC_SQNR_FLOORS_DB, ids=str)
def test_signal_to_noise_of_asymmetric_rounding(bits: int, group: int) -> None:
    x = affine.split_groups(torch.randn(256, 4096), group)
    scale, zero_point = affine.choose_scale_and_zero_point(x, bits=bits)
    approximation = affine.fake_quantize(x, scale.unsqueeze(-1), zero_point.unsqueeze(-1), bits=bits)
    assert sqnr_db(x, approximation) >= ASYMMETRIC_SQNR_FLOORS_DB[bits, group]

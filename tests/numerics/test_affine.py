import pytest
import torch
from hypothesis import given, settings, strategies as st

from hfquant.errors import SchemeError
from hfquant.numerics import affine
from hfquant.numerics.metrics import sqnr_db
from tests.support.tolerance import ASYMMETRIC_SQNR_FLOORS_DB, SQNR_FLOORS_DB


seeds = st.integers(0, 2**16)
bits_of = st.sampled_from([4, 8])
magnitudes = st.sampled_from([1e-40, 1e-30, 1e-6, 1.0, 1e4, 1e30])


def groups(seed: int, magnitude: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 16, generator=generator) * magnitude


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, magnitudes)
def test_rounding_error_is_at_most_half_a_step(seed: int, bits: int, magnitude: float) -> None:
    x = groups(seed, magnitude)
    scale = affine.choose_scale(x, bits=bits).unsqueeze(-1)
    error = (x - affine.fake_quantize(x, scale, bits=bits)).abs()
    # the scale is rounded to bfloat16: what it loses (1 part in 512) is clipped at the edge of the grid
    clipped = x.abs() > scale * affine.code_range(bits)[1]
    bound = torch.where(clipped, 0.5 * scale + x.abs() / 256, 0.5 * scale) * (1 + 1e-6)
    assert bool((error <= bound).all())


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, magnitudes)
def test_scales_are_finite_not_zero_and_bfloat16(seed: int, bits: int, magnitude: float) -> None:
    x = groups(seed, magnitude)
    x[0] = 0
    for scale in (affine.choose_scale(x, bits=bits), affine.choose_scale_and_zero_point(x, bits=bits)[0]):
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
        assert torch.equal(scale, scale.bfloat16().float())
        assert torch.equal(affine.scale_from_bits(affine.scale_to_bits(scale)), scale)
    assert bool((affine.quantize(x, affine.choose_scale(x, bits=bits).unsqueeze(-1), bits=bits)[0] == 0).all())


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, st.booleans())
def test_codes_survive_a_second_rounding(seed: int, bits: int, negative: bool) -> None:
    x = groups(seed)
    scale = affine.choose_scale(x, bits=bits).unsqueeze(-1) * (-1 if negative else 1)
    codes = affine.quantize(x, scale, bits=bits)
    assert torch.equal(affine.quantize(affine.dequantize(codes, scale), scale, bits=bits), codes)


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_scale_only(seed: int, bits: int, exponent: int) -> None:
    x = groups(seed)
    scale, shifted = affine.choose_scale(x, bits=bits), affine.choose_scale(x * 2.0**exponent, bits=bits)
    assert torch.equal(scale * 2.0**exponent, shifted)
    codes = affine.quantize(x, scale.unsqueeze(-1), bits=bits)
    assert torch.equal(affine.quantize(x * 2.0**exponent, shifted.unsqueeze(-1), bits=bits), codes)


@settings(deadline=None, max_examples=50)
@given(seeds, bits_of)
def test_asymmetric_grids_hold_zero_and_the_range(seed: int, bits: int) -> None:
    x = groups(seed) + 3
    scale, zero_point = affine.choose_scale_and_zero_point(x, bits=bits)
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    assert bool((affine.fake_quantize(torch.zeros_like(x), scale, zero_point, bits=bits) == 0).all())
    error = (x - affine.fake_quantize(x, scale, zero_point, bits=bits)).abs()
    assert bool((error <= scale * 1.5 + x.abs() / 128).all())


def test_ties_go_to_even_and_codes_are_clamped() -> None:
    x = torch.tensor([-100.0, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5, 100.0])
    codes = affine.quantize(x, torch.tensor(1.0), bits=4)
    assert codes.tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 7, 7]
    assert affine.quantize(x, torch.tensor(-1.0), bits=4).tolist() == [7, 7, 2, 2, 0, 0, -2, -2, -8, -8]


def test_permuting_rows_permutes_codes() -> None:
    x, order = groups(0), torch.tensor([3, 1, 5, 0, 2, 4])
    scale = affine.choose_scale(x, bits=4)
    codes = affine.quantize(x, scale.unsqueeze(-1), bits=4)
    assert torch.equal(affine.choose_scale(x[order], bits=4), scale[order])
    assert torch.equal(affine.quantize(x[order], scale[order].unsqueeze(-1), bits=4), codes[order])


@pytest.mark.parametrize(("given", "expected"), [(0.0, 1.0), (1e-45, 2.0**-126), (3e38, None), (-0.5, -0.5)])
def test_round_scale(given: float, expected: float | None) -> None:
    rounded = float(affine.round_scale(torch.tensor(given)))
    assert rounded == (expected if expected is not None else float(torch.tensor(given).bfloat16()))


def test_round_scale_never_overflows() -> None:
    assert float(affine.round_scale(torch.tensor(torch.finfo(torch.float32).max))) == affine.LARGEST_SCALE


def test_row_scale_is_absmax_over_127() -> None:
    x = torch.tensor([[1.0, -254.0], [0.0, 0.0], [float("nan"), 1.0]])
    scale = affine.choose_row_scale(x).flatten()
    assert scale[:2].tolist() == [2.0, 1.0]
    assert bool(scale[2].isnan())
    assert affine.choose_row_scale(torch.empty(2, 0)).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("size", [0, 5, 7])
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

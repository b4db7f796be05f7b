import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hfquant.numerics.affine import fake_quantize, quantize
from hfquant.ptq.rtn import choose_rtn
from hfquant.ptq.search import RATIOS, choose_by_search
from hfquant.schemes import WeightScheme
from tests.support.tolerance import SEARCH_SQNR_FLOORS_DB


SYMMETRIC, ASYMMETRIC = WeightScheme(4), WeightScheme(4, symmetric=False)
DRAWS = {
    "normal": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "uniform": torch.distributions.Uniform(-1.0, 1.0),
    "skewed": torch.distributions.Exponential(1.0),
}


def groups(seed: int, draw: str = "normal", size: int = 32) -> Tensor:
    torch.manual_seed(seed)
    return DRAWS[draw].sample((64, size))


def squared_error(x: Tensor, chosen: tuple[Tensor, Tensor | None]) -> Tensor:
    """Of each group, in float64."""
    scale, zero_point = chosen
    shift = None if zero_point is None else zero_point.unsqueeze(-1)
    values = fake_quantize(x, scale.unsqueeze(-1), shift, bits=4)
    return (values.double() - x.double()).square().sum(-1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.sampled_from(sorted(DRAWS)))
def test_no_candidate_beats_the_chosen_scale(seed: int, draw: str) -> None:
    x = groups(seed, draw)
    chosen = squared_error(x, choose_by_search(x, SYMMETRIC))
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    for ratio in RATIOS:
        candidate = (extreme / -8 * ratio).bfloat16().float()
        assert bool((chosen <= squared_error(x, (candidate, None)) * (1 + 1e-5)).all())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.sampled_from(sorted(DRAWS)))
def test_asymmetric_search_is_never_worse_than_round_to_nearest(seed: int, draw: str) -> None:
    x = groups(seed, draw)
    chosen, nearest = (squared_error(x, choose(x, ASYMMETRIC)) for choose in (choose_by_search, choose_rtn))
    assert bool((chosen <= nearest * (1 + 1e-5)).all())
    assert bool((chosen < nearest * 0.99).any())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("draw", DRAWS)
def test_symmetric_search_loses_less_than_round_to_nearest_over_a_matrix(draw: str, size: int) -> None:
    x = torch.cat([groups(seed, draw, size) for seed in range(8)])
    chosen, nearest = (squared_error(x, choose(x, SYMMETRIC)).sum() for choose in (choose_by_search, choose_rtn))
    assert float(chosen / nearest) < 0.97


@pytest.mark.parametrize(("symmetric", "size"), SEARCH_SQNR_FLOORS_DB)
def test_signal_to_noise_of_search(symmetric: bool, size: int) -> None:
    x = torch.randn(256 * 4096 // size, size)
    noise = squared_error(x, choose_by_search(x, SYMMETRIC if symmetric else ASYMMETRIC)).sum()
    assert float(10 * torch.log10(x.double().square().sum() / noise)) >= SEARCH_SQNR_FLOORS_DB[symmetric, size]


def test_the_largest_weight_gets_the_outermost_level() -> None:
    x = groups(0)
    scale, _ = choose_by_search(x, SYMMETRIC)
    codes = quantize(x, scale.unsqueeze(-1), bits=4)
    extreme = x.abs().argmax(-1, keepdim=True)
    assert bool((codes.gather(-1, extreme) == -8).all())
    assert torch.equal(scale.sign(), -x.gather(-1, extreme).squeeze(-1).sign())
    assert 0 < int((scale < 0).sum()) < len(scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_eight_bits_are_round_to_nearest(symmetric: bool) -> None:
    x, scheme = groups(0), WeightScheme(8, symmetric=symmetric)
    for found, expected in zip(choose_by_search(x, scheme), choose_rtn(x, scheme), strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=["sym", "asym"])
def test_negating_or_scaling_the_weights_changes_no_error(scheme: WeightScheme) -> None:
    x = groups(1)
    error = squared_error(x, choose_by_search(x, scheme))
    scaled = squared_error(x * 2.0**10, choose_by_search(x * 2.0**10, scheme)) * 2.0**-20
    torch.testing.assert_close(scaled, error)
    if scheme.symmetric:
        torch.testing.assert_close(squared_error(-x, choose_by_search(-x, scheme)), error)

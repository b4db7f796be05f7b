import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from hfquant.errors import CalibrationError
from hfquant.numerics.affine import fake_quantize
from hfquant.numerics.metrics import kl_divergence, sqnr_db
from hfquant.numerics.observers import AbsMaxObserver, choose_input_scale


seeds = st.integers(0, 2**16)


def test_sqnr_by_hand() -> None:
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == pytest.approx(0.0)
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf


def test_sqnr_does_not_overflow_the_dtype() -> None:
    x = torch.full((4096,), 300.0, dtype=torch.float16)
    assert sqnr_db(x, x * 0.5) == pytest.approx(20 * math.log10(2))


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl_divergence(p.log() + 7, q.log() - 3)) == pytest.approx(expected, rel=1e-6)
    assert float(kl_divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-15)


@settings(deadline=None, max_examples=50)
@given(seeds, st.sampled_from([0.1, 1.0, 30.0]))
def test_kl_is_torchs_and_not_negative(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, other = torch.randn(2, 3, 5, 11, generator=generator, dtype=torch.float64) * spread
    found = kl_divergence(reference, other)
    logs = [torch.log_softmax(logits, -1) for logits in (other, reference)]
    expected = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    assert found.shape == (3, 5)
    torch.testing.assert_close(found, expected)
    assert float(found.min()) >= -1e-12


def test_kl_of_tokens_that_the_reference_rules_out_is_zero() -> None:
    reference = torch.tensor([0.0, 0.0, -math.inf])
    assert float(kl_divergence(reference, reference)) == pytest.approx(0)
    assert float(kl_divergence(reference, torch.zeros(3))) == pytest.approx(math.log(1.5))
    assert float(kl_divergence(torch.zeros(3), reference)) == math.inf


def test_observer_keeps_the_largest_magnitude() -> None:
    observer = AbsMaxObserver()
    observer.observe(torch.tensor([[1.0, -2.0]]))
    observer.observe(torch.tensor([[0.5, 0.25], [0.0, 0.0]], dtype=torch.bfloat16))
    observer.observe(torch.empty(0, 2))
    assert (observer.absmax, observer.rows) == (2.0, 3)
    assert float(observer.scale()) == float(torch.tensor(2 / 127).bfloat16())


def test_observer_counts_rows_of_any_shape() -> None:
    observer = AbsMaxObserver()
    observer.observe(torch.ones(2, 3, 4, requires_grad=True))
    observer.observe(torch.ones(4))
    assert observer.rows == 7


def test_observer_of_zeros_has_a_usable_scale() -> None:
    observer = AbsMaxObserver()
    observer.observe(torch.zeros(2, 4))
    assert observer.scale().tolist() == [1.0]


def test_observer_of_nothing_has_no_scale() -> None:
    with pytest.raises(CalibrationError, match="no activation"):
        AbsMaxObserver().scale()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observer_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        AbsMaxObserver().observe(torch.tensor([[1.0, bad]]))


def test_percentile_and_mse_ranges_leave_outliers_out() -> None:
    x = torch.randn(4096, 8)
    x[5, 2] = 60

    def error(scale: torch.Tensor) -> float:
        return float((fake_quantize(x, scale, bits=8) - x).square().sum())

    scales = {kind: choose_input_scale(x, x.abs().max(), kind) for kind in ("minmax", "percentile", "mse")}
    assert float(scales["minmax"]) == float(torch.tensor(60 / 127).bfloat16())
    assert scales["percentile"] < scales["minmax"] / 10
    assert scales["mse"] < scales["minmax"]
    assert error(scales["mse"]) <= min(error(scales["minmax"]), error(scales["percentile"]))
    with pytest.raises(CalibrationError, match="expected minmax, percentile or mse"):
        choose_input_scale(x, x.abs().max(), "median")

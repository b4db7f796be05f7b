import math

import pytest
import torch

from hfquant.errors import CalibrationError
from hfquant.numerics.metrics import kl_divergence, sqnr_db
from hfquant.numerics.observers import AbsMaxObserver


def test_sqnr_by_hand() -> None:
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl_divergence(p.log() + 7, q.log() - 3)) == pytest.approx(expected, rel=1e-6)
    assert float(kl_divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-15)


def test_observer_keeps_the_largest_magnitude() -> None:
    observer = AbsMaxObserver()
    observer.observe(torch.tensor([[1.0, -2.0]]))
    observer.observe(torch.tensor([[0.5, 0.25], [0.0, 0.0]]))
    observer.observe(torch.empty(0, 2))
    assert (observer.absmax, observer.rows) == (2.0, 3)
    assert float(observer.scale()) == float(torch.tensor(2 / 127).bfloat16())


def test_observer_of_nothing_has_no_scale() -> None:
    with pytest.raises(CalibrationError, match="no activation"):
        AbsMaxObserver().scale()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observer_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        AbsMaxObserver().observe(torch.tensor([[1.0, bad]]))

"""What learned rounding minimises."""

import pytest
import torch
from torch import Tensor

from hfquant.ptq.blocks import relative_error
from hfquant.ptq.signround import Task


def outputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 5, 8, generator=generator)
    return wanted + 0.1 * torch.randn(2, 5, 8, generator=generator), wanted


def test_the_loss_is_each_tokens_error_over_its_size() -> None:
    got, wanted = outputs()
    rows = [(got[b, t] - wanted[b, t], wanted[b, t]) for b in (0, 1) for t in range(5)]
    by_hand = [float(error.square().sum() / value.norm()) for error, value in rows]
    sizes = [float(value.norm()) for _, value in rows]
    median = sorted(sizes)[4]  # the lower one of two in the middle
    assert float(Task(lambda: got, wanted).loss()) == pytest.approx(sum(by_hand) / 10 / median, rel=1e-5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    counted = (0, 1, 5)
    median = sorted(sizes[i] for i in counted)[1]
    expected = sum(by_hand[i] for i in counted) / 3 / median
    assert float(Task(lambda: got, wanted, mask).loss()) == pytest.approx(expected, rel=1e-5)


def test_a_large_token_counts_more_but_not_alone() -> None:
    got, wanted = outputs()
    before = Task(lambda: got, wanted).loss()
    size = torch.ones(2, 5, 1)
    size[0, 0] = 100.0
    after = Task(lambda: got * size, wanted * size).loss()
    # By relative errors alone it would be as before, by squared ones hundreds of times that.
    assert 2 * before < after < 20 * before


def test_a_row_of_zeros_does_not_outweigh_the_others() -> None:
    got, wanted = outputs()
    wanted[1, 4], got[1, 4] = 0, 1e-4
    assert relative_error(got, wanted)[1, 4] < 0.1

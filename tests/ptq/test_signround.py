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


def test_the_loss_is_the_mean_of_each_tokens_relative_error() -> None:
    got, wanted = outputs()
    by_hand = [
        float((got[b, t] - wanted[b, t]).square().sum() / wanted[b, t].square().sum()) for b in (0, 1) for t in range(5)
    ]
    assert float(Task(lambda: got, wanted).loss()) == pytest.approx(sum(by_hand) / 10, rel=1e-5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    assert float(Task(lambda: got, wanted, mask).loss()) == pytest.approx(
        sum(by_hand[i] for i in (0, 1, 5)) / 3, rel=1e-5
    )


def test_a_token_of_huge_energy_counts_as_much_as_another() -> None:
    got, wanted = outputs()
    before = Task(lambda: got, wanted).loss()
    size = torch.ones(2, 5, 1)
    size[0, 0] = 100.0
    assert torch.allclose(Task(lambda: got * size, wanted * size).loss(), before, rtol=1e-5)


def test_a_row_of_zeros_does_not_outweigh_the_others() -> None:
    got, wanted = outputs()
    wanted[1, 4], got[1, 4] = 0, 1e-4
    assert relative_error(got, wanted)[1, 4] < 0.1

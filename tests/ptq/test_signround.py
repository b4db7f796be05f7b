"""What learned rounding minimises."""

import pytest
import torch
from torch import Tensor, nn

from hfquant.ptq.blocks import relative_error
from hfquant.ptq.gptq import Grid
from hfquant.ptq.quantize_matrix import MatrixResult
from hfquant.ptq.signround import Task, learn_rounding


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


def test_one_large_gradient_outweighs_many_small_ones() -> None:
    # Columns 0 to 31 of row 0 gain from a step up in every batch. The others are pulled up a little by three batches
    # of four and down a lot by the fourth: in sum down, where signs of gradients would go up. Row 1 is exact, and
    # makes all tokens equally large.
    layer = nn.Linear(64, 2, bias=False)
    weight = torch.stack([torch.full((64,), 0.2), torch.full((64,), 6.0)])
    grid = Grid(torch.ones(2, 1), None, 64, 4)
    start = MatrixResult(weight=weight, grid=grid, method="gptq", losses={})
    inputs = torch.eye(64).unsqueeze(0)
    tasks = []
    for number in range(16):
        wanted = weight.clone()
        wanted[0, :32] = 0.6
        wanted[0, 32:] = -0.9 if number % 4 == 0 else 0.2
        tasks.append(Task(lambda: layer(inputs), wanted.t().unsqueeze(0)))
    moved = learn_rounding({"layer": layer}, {"layer": start}, tasks, iterations=200, seed=0)["layer"]
    assert moved.method == "signround"
    assert bool((moved.weight[0, :32] > 0.45).all())
    assert bool((moved.weight[0, 32:] < 0.15).all())

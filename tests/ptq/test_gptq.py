"""One matrix: GPTQ against the formula, the guard, and what is said about unusable inputs."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hfquant.errors import CalibrationError
from hfquant.numerics.affine import dequantize, quantize, scale_from_bits
from hfquant.numerics.packing import unpack
from hfquant.ptq.gptq import Grid, gptq, layer_loss
from hfquant.ptq.quantize_matrix import quantize_matrix
from hfquant.ptq.statistics import InputStatistics
from hfquant.ptq.weighted_search import choose_weighted
from hfquant.schemes import WeightScheme
from tests.support.tolerance import SAME_VALUES


def correlated(rows: int, features: int) -> Tensor:
    return torch.randn(rows, features // 2) @ torch.randn(features // 2, features) + 0.3 * torch.randn(rows, features)


def statistics(train: Tensor, held: Tensor) -> InputStatistics:
    found = InputStatistics.empty(train.shape[1], train.device)
    found.add(train, held=False, sample_rows=8)
    found.add(held, held=True, sample_rows=8)
    return found


def grid_of(weight: Tensor, scheme: WeightScheme, importance: Tensor) -> Grid:
    size = scheme.group_size
    scale, zero = choose_weighted(weight.view(len(weight), -1, size), scheme, importance.view(-1, size))
    return Grid(scale, zero, size, scheme.bits)


def reference_gptq(weight: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Optimal brain compression by its definition: one column at a time, the inverse Hessian downdated each time."""
    weight, left = weight.double().clone(), list(torch.argsort(hessian.diagonal(), descending=True, stable=True))
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    result = torch.empty_like(weight)
    while left:
        index = torch.stack(left)
        inverse = torch.linalg.inv(damped[index][:, index])
        result[:, left[0]] = grid.nearest(weight.float())[:, left[0]].double()
        error = (weight[:, left[0]] - result[:, left[0]]) / inverse[0, 0]
        weight[:, index] -= error[:, None] * inverse[0]
        left.pop(0)
    return result


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_follows_its_definition(symmetric: bool) -> None:
    weight, x = torch.randn(6, 32), correlated(100, 32)
    hessian = x.t() @ x
    grid = grid_of(weight, WeightScheme(4, 16, symmetric), hessian.diagonal())
    made = gptq(weight, grid, hessian, name="layer")
    torch.testing.assert_close(grid.nearest(made.weight).double(), reference_gptq(weight, grid, hessian), **SAME_VALUES)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.booleans())
def test_gptq_is_never_worse_than_nearest_on_its_own_hessian(seed: int, bits: int, symmetric: bool) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(5, 32), correlated(64, 32)
    hessian = x.t() @ x
    grid = grid_of(weight, WeightScheme(bits, 16, symmetric), hessian.diagonal())
    made = gptq(weight, grid, hessian, name="layer")
    nearest = layer_loss(grid.nearest(weight) - weight, hessian)
    assert layer_loss(grid.nearest(made.weight) - weight, hessian) <= nearest


def test_columns_across_blocks_and_dead_inputs() -> None:
    weight, x = torch.randn(4, 320), correlated(500, 320)
    x[:, 7] = 0
    hessian = x.t() @ x
    grid = grid_of(weight, WeightScheme(4, 32), hessian.diagonal())
    made = gptq(weight, grid, hessian, name="layer")
    assert made.dead == 1
    assert torch.equal(made.weight[:, 7], weight[:, 7])
    nearest = layer_loss(grid.nearest(weight) - weight, hessian)
    assert layer_loss(grid.nearest(made.weight) - weight, hessian) < nearest / 2


def test_the_guard_keeps_the_search_where_gptq_loses() -> None:
    weight = torch.randn(8, 32)
    train, held = correlated(40, 32), torch.randn(200, 32)  # inputs that the calibration data does not resemble
    result = quantize_matrix(weight, WeightScheme(4, 16), statistics(train, held), algorithm="gptq", name="layer")
    assert result.losses["gptq"] > result.losses["weighted"]
    assert (result.method, result.note) == ("weighted", "GPTQ was worse on held-out rows")
    assert torch.equal(result.weight, weight)
    alike = statistics(train, train)
    assert quantize_matrix(weight, WeightScheme(4, 16), alike, algorithm="gptq", name="layer").method == "gptq"


@pytest.mark.parametrize(
    "scheme", [WeightScheme(4, 16), WeightScheme(4, 16, symmetric=False), WeightScheme(8)], ids=str
)
def test_packed_codes_are_those_of_the_grid(scheme: WeightScheme) -> None:
    weight, x = torch.randn(8, 32), correlated(200, 32)
    result = quantize_matrix(weight, scheme, statistics(x, x), algorithm="gptq", name="layer")
    packed = result.packed()
    codes = unpack(packed.weight, bits=scheme.bits, length=32).view(8, -1, result.grid.group_size)
    scale = scale_from_bits(packed.weight_scale).unsqueeze(-1)
    zero = packed.weight_zero_point
    groups = 32 // result.grid.group_size
    zero = None if zero is None else unpack(zero, bits=scheme.bits, length=groups).unsqueeze(-1)
    assert torch.equal(dequantize(codes, scale, zero).view(8, 32), result.grid.nearest(result.weight))
    assert torch.equal(codes, quantize(result.weight.view_as(codes), scale, zero, bits=scheme.bits))


def test_the_weighted_search_minimises_what_it_says() -> None:
    weight, importance = torch.randn(16, 2, 16), torch.rand(2, 16) ** 4
    scheme = WeightScheme(4, 16)

    def loss(scale: Tensor) -> Tensor:
        grid = Grid(scale, None, 16, 4)
        return ((grid.nearest(weight.flatten(1)).view_as(weight) - weight).square() * importance).sum(-1)

    best, _ = choose_weighted(weight, scheme, importance)
    plain, _ = choose_weighted(weight, scheme, torch.ones(2, 16))
    assert (loss(best) <= loss(plain) * (1 + 1e-6)).all()
    assert loss(best).sum() < 0.9 * loss(plain).sum()


def test_few_rows_keep_the_weighted_search() -> None:
    weight, x = torch.randn(8, 32), torch.randn(7, 32)
    result = quantize_matrix(weight, WeightScheme(4, 16), statistics(x, x), algorithm="gptq", name="layer")
    assert (result.method, result.note) == ("weighted", "only 7 rows of calibration data reached it")


def test_more_damping_is_tried_before_giving_up() -> None:
    weight = torch.randn(4, 32)
    grid = grid_of(weight, WeightScheme(4, 16), torch.ones(32))
    broken = torch.eye(32) - 0.05  # an eigenvalue of -0.6: only heavy damping makes it positive
    assert gptq(weight, grid, broken, name="layer").damping == 1.0
    with pytest.raises(CalibrationError, match=r"layer: its inputs give no usable second moments.*skip_modules"):
        gptq(weight, grid, torch.eye(32) * math.inf, name="layer")

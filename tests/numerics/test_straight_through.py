"""Gradients through the grid, against autograd of the formula in float64."""

import pytest
import torch
from torch import Tensor

from hfquant.numerics.affine import code_range
from hfquant.numerics.straight_through import (
    activation_gradients,
    learned_scale,
    row_codes,
    row_values,
    weight_gradients,
)
from tests.support.straight_through import clipped
from tests.support.tolerance import assert_close


def straight(x: Tensor, bits: int, shift: Tensor | float = 0.0) -> Tensor:
    """``clamp(round(x) + shift)`` whose gradient is 1 inside the range and 0 outside."""
    rounded = x + (torch.round(x) - x).detach() + shift
    return clipped(rounded, bits)


def case(bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(bits)
    weight, grad = torch.randn(6, 4, 8), torch.randn(6, 4, 8)
    scale = (torch.rand(6, 4) * 2 + 1) / code_range(bits)[1]  # some weights lie outside the range
    scale = scale.bfloat16().float() * (torch.where(torch.rand(6, 4) < 0.5, -1, 1) if symmetric else 1)
    zero = None if symmetric else torch.randint(-3, 4, (6, 4), dtype=torch.int8)
    return weight, scale, zero, grad


@pytest.mark.parametrize("blend", [1.0, 0.25])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_and_scale_gradients_are_those_of_the_formula(bits: int, symmetric: bool, blend: float) -> None:
    weight, scale, zero, grad = case(bits, symmetric)

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w, u = weight.to(dtype).requires_grad_(), torch.zeros(6, 4, dtype=dtype, requires_grad=True)
        s = (scale.to(dtype) * u.exp()).unsqueeze(-1)
        shift = 0.0 if zero is None else zero.to(dtype).unsqueeze(-1)
        values = (straight(w / s, bits, shift) - shift) * s
        ((w + blend * (values - w)) * grad.to(dtype)).sum().backward()
        return w.grad.flatten(-2), u.grad

    flat = (t.flatten(-2) for t in (grad.clone(), weight))
    found = weight_gradients(*flat, scale, zero, bits=bits, blend=blend)
    outside = (found[0] == 0).float().mean() if blend == 1 else torch.tensor(0.1)
    assert 0.01 < outside < 0.9
    for ours, oracle, plain in zip(found, formula(torch.float64), formula(torch.float32), strict=True):
        assert_close(ours, oracle, plain)


def test_activation_gradients_are_those_of_the_formula() -> None:
    x, grad, scale = torch.randn(9, 7), torch.randn(9, 7), torch.tensor([0.01])

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, u = x.to(dtype).requires_grad_(), torch.zeros(1, dtype=dtype, requires_grad=True)
        s = scale.to(dtype) * u.exp()
        (straight(a / s, 8) * s * grad.to(dtype)).sum().backward()
        return a.grad, u.grad

    found = activation_gradients(grad, x, scale)
    assert 0 < (found[0] == 0).sum() < x.numel()
    for ours, oracle, plain in zip(found, formula(torch.float64), formula(torch.float32), strict=True):
        assert_close(ours, oracle, plain)


def test_a_learned_scale_keeps_its_sign_and_is_bfloat16() -> None:
    initial = torch.tensor([0.5, -0.25, 3e38, -1e-38])
    scale = learned_scale(initial, torch.tensor([0.3, -0.3, 90.0, -90.0]))
    assert torch.equal(scale.sign(), initial.sign())
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.isfinite(scale).all()
    assert torch.equal(learned_scale(initial[:2], torch.zeros(2)), initial[:2])


def test_codes_of_a_transposed_weight_are_contiguous() -> None:
    weight = torch.randn(8, 4).t()
    codes = row_codes(weight, torch.full((4, 2), 0.2), None, bits=4)
    assert codes.is_contiguous()
    values = row_values(codes, torch.full((4, 2), 0.2), None, dtype=torch.float32)
    assert float((values - weight.clamp(-1.6, 1.4)).abs().max()) <= 0.1 + 1e-6

"""Gradients of both linear ops against float64 autograd of the same formula, straight through the rounding."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.linear_case import DTYPES, KINDS, LinearCase
from tests.support.tolerance import GRADIENT_FACTOR, assert_close


def expected_gradients(case: LinearCase, upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias by autograd, in ``dtype``."""
    x = case.x.detach().to(dtype).requires_grad_()
    bias = case.bias.detach().to(dtype).requires_grad_()
    torch.nn.functional.linear(x, case.weight.to(dtype), bias).backward(upstream.to(dtype))
    return x.grad, bias.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "symmetric"), [(None, True), (32, True), (32, False)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_of_input_and_bias(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype, kind: str
) -> None:
    case = LinearCase(6, 96, 9, bits, group, symmetric, dtype)
    upstream = torch.randn(6, 9).to(dtype)
    x, bias = case.x.view(2, 3, 96).requires_grad_(), case.bias.requires_grad_()
    case.run(x, kind, bias=bias).backward(upstream.view(2, 3, 9))
    exact = expected_gradients(case, upstream, torch.float64)
    plain = expected_gradients(case, upstream, dtype)
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)
    assert_close(x.grad.view(6, 96), exact[0], plain[0], factor=GRADIENT_FACTOR)
    assert_close(bias.grad, exact[1], plain[1], factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradcheck_where_nothing_is_rounded(bits: int) -> None:
    case = LinearCase(2, 8, 3, bits, 4, False, torch.float64)
    inputs = (case.x.requires_grad_(), case.bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, bias: case.run(x, "weight_only", bias=bias), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_only_what_asks_gets_a_gradient(bits: int, kind: str) -> None:
    case = LinearCase(4, 64, 5, bits)
    case.run(case.x, kind, bias=case.bias.requires_grad_()).sum().backward()
    assert case.x.grad is None
    assert torch.equal(case.bias.grad, torch.full((5,), 4.0))
    x = case.x.requires_grad_()
    case.run(x, kind, bias=case.bias.detach()).sum().backward()
    assert_close(x.grad, case.weight.sum(0).expand(4, 64), case.weight.float().sum(0).expand(4, 64))
    assert not case.run(case.x.detach(), kind).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients_of_any_layout(kind: str) -> None:
    case = LinearCase(6, 64, 5, 4, 32)
    x, upstream = case.x.requires_grad_(), torch.randn(5, 6).t()
    case.run(x, kind).backward(upstream)
    oracle, plain = upstream.double() @ case.weight, upstream @ case.weight.float()
    assert_close(x.grad, oracle, plain, factor=GRADIENT_FACTOR)
    x.grad = None
    case.run(x, kind).sum().backward()  # an expanded gradient, all strides zero
    ones = torch.ones(6, 5)
    assert_close(x.grad, ones.double() @ case.weight, ones @ case.weight.float(), factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64)], ids=str)
def test_gradients_of_one_row_and_of_none(shape: tuple[int, ...]) -> None:
    case = LinearCase(1, 64, 5, 8)
    x, bias = torch.randn(shape, requires_grad=True), case.bias.requires_grad_()
    case.run(x, "dynamic", bias=bias).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(bias.grad, torch.full((5,), 1.0 if len(shape) == 1 else 0.0))


def test_gradients_of_a_bias_in_another_dtype_come_back_in_its_own() -> None:
    case = LinearCase(6, 64, 5, 4, dtype=torch.bfloat16)
    bias = case.bias.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run(case.x.requires_grad_(), "weight_only", bias=bias)
    out.sum().backward()
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    case = LinearCase(6, 64, 5, 4, 32)
    x = case.x.requires_grad_()
    case.run(x, kind).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(case.run, x, kind, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)

"""Triton's elementwise kernels in the interpreter, bit for bit against the references."""

import tests.support.triton_interpreter  # noqa: F401  isort: skip

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.dequantize.reference import dequantize_reference
from hfquant.kernels.dequantize.triton import dequantize_triton
from hfquant.kernels.fake_quant_linear import reference as layer_reference, triton as layer_triton
from hfquant.kernels.fake_quantize import reference as fake_reference, triton as fake_triton
from hfquant.kernels.grid.triton import probe
from hfquant.kernels.grid_weight import reference as grid_reference, triton as grid_triton
from hfquant.kernels.quant_embedding.triton import quant_embedding_triton
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference
from hfquant.kernels.quantize_rows.triton import quantize_rows_triton
from hfquant.numerics import affine
from hfquant.numerics.packing import pack
from tests.support.linear_case import DTYPES, LinearCase
from tests.support.tolerance import GRADIENT_FACTOR, SAME_VALUES, assert_close
from tests.support.triton_interpreter import narrow, widen


# NumPy warns of infinity times zero, which a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

GROUPS = [(64, 32), (100, None), (7, None), (2, None), (1025, 205), (1600, None)]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@triton.jit
def _multiply_add(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * tl.load(y_ptr + at) + tl.load(x_ptr + at))


def test_the_interpreter_computes_bfloat16() -> None:
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out = torch.empty_like(x)
    _multiply_add[(1,)](x, y, out, SIZE=64)
    assert torch.equal(out, x * y + x)
    values = torch.randn(1000) * 1e3
    assert np.array_equal(narrow(values.numpy()), values.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(widen(narrow(values.numpy())), values.bfloat16().float().numpy())
    assert probe(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("k", "group"), GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_and_embedding(bits: int, k: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> None:
    packed = LinearCase(1, k, 5, bits, group, symmetric).packed
    whole = dequantize_reference(*packed, bits, k, dtype)
    assert torch.equal(dequantize_triton(*packed, bits, k, dtype), whole)
    for ids in (torch.tensor([[0, 3], [3, 4]]), torch.tensor(2, dtype=torch.int32)):
        assert torch.equal(quant_embedding_triton(ids, *packed, bits, k, dtype), whole[ids.long()])
    bad = quant_embedding_triton(torch.tensor([-1, 1, 5, 2**40]), *packed, bits, k, dtype)
    assert torch.equal(bad[1], whole[1])
    assert bool(bad[[0, 2, 3]].isnan().all())


def test_dequantize_of_experts_and_of_nothing() -> None:
    words, scale, _ = LinearCase(1, 32, 6, 4, 16).packed
    stacked = words.view(2, 3, -1), scale.view(2, 3, 2), None
    assert torch.equal(
        dequantize_triton(*stacked, 4, 32, torch.float32), dequantize_reference(*stacked, 4, 32, torch.float32)
    )
    assert dequantize_triton(words[:0], scale[:0], None, 4, 32, torch.float32).shape == (0, 32)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic-asym", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (3, 1025), (2, 9000), (0, 8), (4, 0)], ids=str)
def test_quantize_rows(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    x = (torch.randn(shape) * 10.0 ** torch.randint(-3, 4, (shape[0], 1))).to(dtype)
    x[1:2] = 0
    x[:1] = x[:1].abs()
    if x.numel() > 100:
        x[2:3, 5], x[3:4, 7], x[4:5, 2] = math.nan, math.inf, -math.inf
    given = (torch.tensor([0.02]) if kind == "static" else None, kind == "dynamic-asym")
    expected, found = quantize_rows_reference(x, *given), quantize_rows_triton(x, *given)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[1].nan_to_num(nan=-1), expected[1].expand_as(found[1]).nan_to_num(nan=-1))


def values_and_scales(
    shape: tuple[int, int], group: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of which some are clipped and many lie on ties, scales of both signs, and zero points."""
    rows, k = shape
    scale = affine.round_scale((torch.rand(rows, k // group) + 0.5) / 16 * torch.randn(rows, k // group).sign())
    steps = torch.randint(-(3 << bits), 3 << bits, shape) / 4
    low, high = affine.code_range(bits)
    zero = torch.randint(low, high + 1, scale.shape, dtype=torch.int8)
    return (steps * scale.repeat_interleave(group, 1)).to(dtype), scale, zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "group"), [((3, 128), 32), ((5, 96), 24), ((2, 4100), 4100), ((1, 2), 1)], ids=str)
def test_fake_quantize(shape: tuple[int, int], group: int, bits: int, dtype: torch.dtype) -> None:
    x, scale, zero_point = values_and_scales(shape, group, bits, dtype)
    x[0, 0] = math.nan
    for zero in (None, zero_point):
        found = fake_triton.fake_quantize_triton(x, scale, zero, bits)
        assert torch.equal(
            found.nan_to_num(), fake_reference.fake_quantize_reference(x, scale, zero, bits).nan_to_num()
        )
        assert bool(found[0, 0].isnan())
        clean, grad = x.nan_to_num(), torch.randn(shape).to(dtype)
        grad_x, grad_scale = fake_triton.fake_quantize_backward_triton(grad, clean, scale, zero, bits)
        expected_x, plain = fake_reference.fake_quantize_backward_reference(grad, clean, scale, zero, bits)
        assert torch.equal(grad_x, expected_x)
        assert_close(grad_scale, exact_sum(grad, clean, scale, zero, bits), plain, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_layer_of_training(bits: int, adapted: bool, dtype: torch.dtype) -> None:
    weight, scale, zero_point = values_and_scales((6, 64), 16, bits, torch.float32)
    lora = (torch.randn(2, 64) / 9, torch.randn(6, 2) / 9) if adapted else (None, None)
    x, grad, bias = torch.randn(2, 3, 64).to(dtype), torch.randn(2, 3, 6).to(dtype), torch.randn(6)
    for zero in (None, zero_point):
        grid = (weight, torch.zeros_like(scale), scale, zero, None, *lora)
        arguments = (x, *grid, None, None, bias, 0.5, False, False, bits, 1.0)
        expected = layer_reference.fake_quant_linear_reference(*arguments)
        assert torch.equal(layer_triton.fake_quant_linear_triton(*arguments), expected)
        arguments = (grad, x, weight, scale, zero, None, *lora, None, 0.5, False, False, bits, 1.0, True, True)
        found = layer_triton.fake_quant_linear_backward_triton(*arguments)
        for mine, plain in zip(found, layer_reference.fake_quant_linear_backward_reference(*arguments), strict=True):
            assert mine.dtype == plain.dtype
            torch.testing.assert_close(mine, plain, **SAME_VALUES)


def exact_sum(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The gradient of scales from its definition, summed in float64."""
    low, high = affine.code_range(bits)
    quotient = (x.float().view(*scale.shape, -1) / scale.unsqueeze(-1)).double()
    shift = 0 if zero is None else zero.double().unsqueeze(-1)
    steps = quotient.round() + shift
    inside = (steps >= low) & (steps <= high)
    return (grad.double().view(quotient.shape) * (steps.clamp(low, high) - shift - inside * quotient)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(3, 128, 32), (5, 96, 24), (2, 2560, 2560), (1, 8, 8)])
def test_grid_weight(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    codes, residual = (pack(torch.randint(-8, 8, (n, k), dtype=torch.int8), bits=4) for _ in range(2))
    _, scale, _ = values_and_scales((n, k), group, 4, dtype)
    delta = (torch.randint(-64, 64, (n, k)) / 16).to(dtype)  # sums that are ties, and clipped ones
    for rest in (None, residual):
        arguments = codes, rest, delta, scale, None, 4
        found = grid_triton.grid_weight_triton(*arguments, dtype)
        assert torch.equal(found, grid_reference.grid_weight_reference(*arguments, dtype))
        grad = torch.randn(n, k).to(dtype)
        grad_delta, grad_scale = grid_triton.grid_weight_backward_triton(grad, *arguments)
        expected, plain = grid_reference.grid_weight_backward_reference(grad, *arguments)
        assert torch.equal(grad_delta, expected)
        clipped = grid_reference.grid_steps(codes, rest, delta, bits=4).clamp(-8, 7).double().view(*scale.shape, -1)
        oracle = (grad.double().view(clipped.shape) * clipped).sum(-1)
        assert_close(grad_scale, oracle, plain, factor=GRADIENT_FACTOR)

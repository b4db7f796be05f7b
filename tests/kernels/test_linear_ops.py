"""Both linear ops against oracles written here from the definition, not from the package's own formulas."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels.int4_linear import int4_linear
from hfquant.kernels.int8_linear import int8_linear
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.packing import pack
from tests.support.tolerance import GRADIENT_FACTOR, SAME_VALUES, assert_close


OPS = {4: int4_linear, 8: int8_linear}
SHAPES = [(1, 64, 3), (7, 100, 1), (64, 96, 33), (2, 7, 5), (0, 32, 4), (3, 1025, 2)]
KINDS = ["weight_only", "dynamic", "static"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """Random codes, scales and activations of one layer."""

    def __init__(self, m: int, k: int, n: int, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype):
        size = group or k
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        self.codes = torch.randint(low, high, (n, k))
        self.scale = (torch.rand(n, k // size) * 0.05 + 0.01).bfloat16().double()
        if bits == 4 and symmetric:
            self.scale *= torch.where(torch.rand_like(self.scale) < 0.5, -1.0, 1.0)
        self.zero = None if symmetric else torch.randint(low, high, (n, k // size))
        self.x = torch.randn(m, k).to(dtype)
        self.bias = torch.randn(n).to(dtype)
        self.input_scale = torch.tensor([0.02]).bfloat16()
        shift = 0 if self.zero is None else self.zero.repeat_interleave(size, 1)
        self.weight = (self.codes - shift).double() * self.scale.repeat_interleave(size, 1)
        packed_zero = None if self.zero is None else pack(self.zero.to(torch.int8), bits=bits)
        self.packed = (pack(self.codes.to(torch.int8), bits=bits), scale_to_bits(self.scale.float()), packed_zero)

    def arguments(self, kind: str) -> dict[str, object]:
        if kind == "static":
            return {"input_scale": scale_to_bits(self.input_scale.float())}
        return {"dynamic": kind == "dynamic"}

    def activations(self, kind: str) -> Tensor:
        """What the layer multiplies with, in float64."""
        x = self.x.double()
        if kind == "weight_only":
            return x
        step = self.input_scale.double() if kind == "static" else (self.x.abs().amax(-1, True).float() / 127).double()
        # the quotient is formed in float32, as the definition says
        return ((self.x.float() / step.float()).round().clamp(-128, 127)).double() * step

    def plain(self, kind: str) -> Tensor:
        """The same formula in the dtype of x."""
        weight = self.weight.to(self.x.dtype)
        return torch.nn.functional.linear(self.activations(kind).to(self.x.dtype), weight, self.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), list(product([4, 8], [True, False])))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_product_with_the_grid(
    shape: tuple[int, int, int], bits: int, symmetric: bool, dtype: torch.dtype, kind: str
) -> None:
    m, k, n = shape
    for group in (None, 32) if k % 32 == 0 else (None,):
        case = Case(m, k, n, bits, group, symmetric, dtype)
        result = OPS[bits](case.x, *case.packed, bias=case.bias, **case.arguments(kind))
        assert result.dtype == dtype
        oracle = case.activations(kind) @ case.weight.t() + case.bias.double()
        assert_close(result, oracle, case.plain(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_strides_and_rows_are_independent(bits: int, kind: str) -> None:
    case = Case(12, 64, 5, bits, 32, True, torch.float32)
    arguments = case.arguments(kind)
    flat = OPS[bits](case.x, *case.packed, **arguments)
    assert torch.equal(OPS[bits](case.x.view(2, 6, 64), *case.packed, **arguments), flat.view(2, 6, 5))
    strided = torch.empty(12, 128)[:, ::2].copy_(case.x)
    assert torch.equal(OPS[bits](strided, *case.packed, **arguments), flat)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bad_row_stays_bad_and_alone(bits: int, kind: str, bad: float) -> None:
    case = Case(3, 64, 5, bits, None, True, torch.float32)
    arguments = case.arguments(kind)
    good = OPS[bits](case.x, *case.packed, **arguments)
    case.x[1, 3] = bad
    result = OPS[bits](case.x, *case.packed, **arguments)
    if kind == "static" and bad == math.inf:
        case.x[1, 3] = 127 * float(case.input_scale)  # a stored range saturates
        assert torch.equal(result, OPS[bits](case.x, *case.packed, **arguments))
    else:
        assert not bool(torch.isfinite(result[1]).any())
    torch.testing.assert_close(result[[0, 2]], good[[0, 2]], **SAME_VALUES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_give_the_bias(bits: int, kind: str) -> None:
    case = Case(2, 64, 5, bits, 32, True, torch.float32)
    result = OPS[bits](torch.zeros(2, 64), *case.packed, bias=case.bias, **case.arguments(kind))
    assert torch.equal(result, case.bias.expand(2, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_of_input_and_bias(bits: int, dtype: torch.dtype, kind: str) -> None:
    case = Case(6, 64, 9, bits, 32, False, dtype)
    x, bias = case.x.view(2, 3, 64).requires_grad_(), case.bias.requires_grad_()
    upstream = torch.randn(2, 3, 9).to(dtype)
    OPS[bits](x, *case.packed, bias=bias, **case.arguments(kind)).backward(upstream)
    flat = upstream.view(6, 9)
    assert_close(x.grad.view(6, 64), flat.double() @ case.weight, flat @ case.weight.to(dtype), factor=GRADIENT_FACTOR)
    assert_close(bias.grad, flat.double().sum(0), flat.sum(0), factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_activations_are_refused_with_the_remedy(bits: int) -> None:
    case = Case(2, 64, 5, bits, None, True, torch.float32)
    with pytest.raises(KernelError, match="skip_modules"):
        OPS[bits](case.x.to(torch.int32), *case.packed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "symmetric"), list(product([4, 8], [True, False])))
def test_opcheck(bits: int, symmetric: bool, kind: str) -> None:
    case = Case(3, 64, 5, bits, 32, symmetric, torch.float32)
    op = torch.ops.hfquant.int4_linear if bits == 4 else torch.ops.hfquant.int8_linear
    arguments = case.arguments(kind)
    results = torch.library.opcheck(
        op.default,
        (
            case.x.requires_grad_(),
            *case.packed,
            arguments.get("input_scale"),
            case.bias.requires_grad_(),
            arguments.get("dynamic", False),
        ),
    )
    assert set(results.values()) == {"SUCCESS"}

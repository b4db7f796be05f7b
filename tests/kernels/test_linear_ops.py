"""Both linear ops against oracles written from the definition, not from the package's own formulas."""

import math
from itertools import product

import pytest
import torch

from hfquant.errors import KernelError
from hfquant.kernels import integer_matmul
from tests.support.linear_case import DTYPES, INTEGER_KINDS, KINDS, LinearCase
from tests.support.tolerance import assert_close


SHAPES = [(1, 64, 3), (7, 100, 1), (64, 96, 33), (2, 7, 5), (0, 32, 4), (3, 1025, 2), (3, 2, 2)]
GRIDS = list(product([4, 8], [True, False]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_product_with_the_grid(
    shape: tuple[int, int, int], bits: int, symmetric: bool, dtype: torch.dtype, kind: str
) -> None:
    m, k, n = shape
    for group in (None, 32) if k % 32 == 0 else (None,):
        case = LinearCase(m, k, n, bits, group, symmetric, dtype)
        result = case.run(case.x, kind, bias=case.bias)
        assert result.dtype == dtype
        assert_close(result, case.oracle(kind), case.plain(kind))


@pytest.mark.parametrize("fast", [True, False], ids=["fastest", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_products_are_scaled_once(
    bits: int, kind: str, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(integer_matmul, "_has_fast_int_mm", lambda a: False)
    case = LinearCase(7, 1100, 5, bits, None, True, dtype)
    codes, step = case.activation_codes(kind)
    product = (codes @ case.codes.double().t()).float()
    expected = product * case.scale.float().flatten() * step.float() + case.bias.float()
    assert torch.equal(case.run(case.x, kind, bias=case.bias), expected.to(dtype))


LAYOUTS = {
    "3d": lambda x: x.view(2, 6, 64),
    "3d-permuted": lambda x: x.view(6, 2, 64).transpose(0, 1).contiguous().transpose(0, 1),
    "every-other-column": lambda x: torch.empty(12, 128, dtype=x.dtype)[:, ::2].copy_(x),
    "column-major": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x.expand(2, 12, 64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_and_strides_do_not_matter(bits: int, kind: str, layout: str) -> None:
    case = LinearCase(12, 64, 5, bits, 32)
    x = LAYOUTS[layout](case.x)
    result = case.run(x, kind, bias=case.bias)
    assert result.shape == (*x.shape[:-1], 5)
    for part in result.view(-1, 12, 5):
        assert_close(part, case.oracle(kind), case.plain(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_one_row_and_none(bits: int, kind: str) -> None:
    case = LinearCase(1, 64, 5, bits, 32)
    row = case.run(case.x[0], kind, bias=case.bias)
    assert_close(row, case.oracle(kind)[0], case.plain(kind)[0])
    assert case.run(torch.empty(2, 0, 64), kind).shape == (2, 0, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [None, 32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bad_row_stays_bad_and_alone(bits: int, kind: str, group: int | None, bad: float) -> None:
    case = LinearCase(3, 64, 5, bits, group)
    good = case.run(case.x, kind)
    case.x[1, 3] = bad
    result = case.run(case.x, kind)
    if kind == "static" and math.isinf(bad):
        case.x[1, 3] = math.copysign(200, bad) * float(case.input_scale)  # a stored range saturates
        assert torch.equal(result, case.run(case.x, kind))
    else:
        assert not bool(torch.isfinite(result[1]).any())
    assert torch.equal(result[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_give_the_bias(bits: int, kind: str) -> None:
    case = LinearCase(2, 64, 5, bits, 32, symmetric=False)
    assert torch.equal(case.run(torch.zeros(2, 64), kind, bias=case.bias), case.bias.expand(2, 5))


@pytest.mark.parametrize("bits", [4, 8])
def test_tiny_rows_are_quantized_like_others(bits: int) -> None:
    case = LinearCase(2, 64, 5, bits)
    scaled = case.run(case.x * 2.0**-100, "dynamic")
    assert torch.equal(scaled, case.run(case.x, "dynamic") * 2.0**-100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [None, 32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_autocast_changes_nothing(
    bits: int, kind: str, group: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_matmul, "_has_fast_int_mm", lambda a: False)
    case = LinearCase(7, 64, 5, bits, group, group is None, dtype)
    expected = case.run(case.x, kind, bias=case.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(case.x, kind, bias=case.bias), expected)
        assert torch.equal(case.run(case.x, kind, bias=case.bias.float()), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_activations_are_refused_with_the_remedy(bits: int, dtype: torch.dtype, kind: str) -> None:
    case = LinearCase(2, 64, 5, bits)
    with pytest.raises(KernelError, match="skip_modules"):
        case.run(case.x.to(dtype), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 32, 56, 72, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_another_length_are_refused(bits: int, k: int, kind: str) -> None:
    case = LinearCase(2, 64, 5, bits)
    with pytest.raises(KernelError, match=f"rows of x hold {k} values, but .* up to 64"):
        case.run(torch.randn(2, k), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_opcheck(bits: int, symmetric: bool, kind: str) -> None:
    case = LinearCase(3, 64, 5, bits, 32, symmetric)
    op = torch.ops.hfquant.int4_linear if bits == 4 else torch.ops.hfquant.int8_linear
    given = case.arguments(kind)
    kind_arguments = (bool(given.get("dynamic")), bool(given.get("asymmetric")))
    for bias in (case.bias.requires_grad_(), None):
        results = torch.library.opcheck(
            op.default, (case.x.requires_grad_(), *case.packed, given.get("input_scale"), bias, *kind_arguments)
        )
        assert set(results.values()) == {"SUCCESS"}

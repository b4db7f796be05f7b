"""The attention op, on every instruction set: against float64, and with the same bits however rows come together."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hfquant.kernels import native
from hfquant.kernels.attention import attention, fits_native
from hfquant.kernels.attention.reference import attention_reference
from tests.support.linear_case import DTYPES
from tests.support.tolerance import GRADIENT_FACTOR, assert_close


NATIVE = torch.ops.hfquant.attention_cpu
SETS = [*(name for name, usable in native.instruction_sets().items() if usable), "reference"]


@pytest.fixture(autouse=True, params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> object:
    with native.selected(request.param):
        yield request.param


def heads(
    batch: int, heads: int, groups: int, tokens: int, keys: int, size: int, value_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; those of a token side by side, as a linear layer leaves them."""
    q = torch.randn(batch, tokens, heads, size).transpose(1, 2)
    k = torch.randn(batch, keys, heads // groups, size).transpose(1, 2)
    return q, k, torch.randn(batch, heads // groups, keys, value_size or size)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> None:
    arguments = (q, k, v, mask, scale, causal)
    wide = [a.double() if isinstance(a, Tensor) and a.dtype != torch.bool else a for a in arguments]
    found = attention(*arguments[:-1], causal=causal)
    assert found.dtype == q.dtype
    assert found.is_contiguous()
    assert_close(found, attention_reference(*wide), attention_reference(*arguments))


SHAPES = [
    # batch, heads, queries per key head, tokens, keys, size, size of values
    (1, 1, 1, 1, 1, 1, 1),
    (2, 6, 3, 5, 5, 16, 16),
    (1, 4, 4, 1, 300, 64, 64),
    (1, 9, 3, 131, 131, 64, 64),
    (2, 2, 1, 13, 129, 40, 72),
    (1, 2, 2, 40, 17, 192, 128),
    (1, 3, 1, 3, 128, 257, 33),
    (1, 8, 8, 70, 70, 24, 24),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads(*shape))
    batch, head_count, _, tokens, keys = shape[:5]
    check(q, k, v, None, causal=False, scale=0.3)
    check(q, k, v, None, causal=True, scale=0.3)
    check(q, k, v, (torch.randn(batch, 1, tokens, keys) * 4).to(dtype), causal=False, scale=0.3)
    seen = torch.rand(batch, head_count, 1, keys) < 0.5
    seen[..., 0] = True
    check(q, k, v, seen, causal=False, scale=0.3)
    check(q, k, v, seen[:1, :1].expand(-1, -1, tokens, -1), causal=False, scale=0.3)


def test_a_token_has_the_same_bits_by_itself() -> None:
    q, k, v = heads(3, 6, 3, 200, 200, 48)
    whole = attention(q, k, v, None, 0.2, causal=True)
    if not native.is_active():
        return
    for t in (0, 1, 57, 127, 128, 199):
        alone = attention(q[1:2, :, t : t + 1], k[1:2, :, : t + 1], v[1:2, :, : t + 1], None, 0.2)
        assert torch.equal(alone[0, 0], whole[1, t])
        assert torch.equal(attention(q[:, :, : t + 1], k, v, None, 0.2, causal=True), whole[:, : t + 1])
    masked = attention(q, k, v, torch.ones(200, 200, dtype=torch.bool).tril()[None, None], 0.2)
    assert torch.equal(masked, whole)


def test_threads_do_not_change_bits() -> None:
    q, k, v = heads(2, 4, 2, 300, 300, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(attention(q, k, v, None, 0.2, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) or not native.is_active()
    assert torch.equal(found[0], found[2]) or not native.is_active()


def test_a_token_that_sees_nothing_is_zero() -> None:
    q, k, v = heads(1, 2, 1, 4, 140, 16)
    seen = torch.rand(1, 1, 4, 140) < 0.5
    seen[:, :, 2] = False
    found = attention(q, k, v, seen, 0.25)
    assert torch.equal(found[:, 2], torch.zeros_like(found[:, 2]))
    assert found.isfinite().all()


def test_keys_that_are_not_seen_do_not_matter() -> None:
    q, k, v = heads(1, 4, 2, 6, 400, 32)
    seen = torch.zeros(1, 1, 6, 400, dtype=torch.bool)
    seen[..., 130:190] = True
    found = attention(q, k, v, seen, 0.2)
    k, v = k.clone(), v.clone()
    k[:, :, :130], k[:, :, 190:] = 7, 1e3
    assert torch.equal(attention(q, k, v, seen, 0.2), found)
    torch.testing.assert_close(found, attention(q, k[:, :, 130:190], v[:, :, 130:190], None, 0.2))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_formula(causal: bool) -> None:
    inputs = heads(2, 6, 3, 40, 40, 16)
    grad = torch.randn(2, 40, 6, 16)
    mask = None if causal else torch.randn(2, 1, 1, 40)

    def gradients(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves, None if mask is None else mask.to(dtype), 0.25, causal)  # type: ignore[operator]
        out.backward(grad.to(dtype))
        return [leaf.grad for leaf in leaves]  # type: ignore[misc]

    found = gradients(torch.ops.hfquant.attention, torch.float32)
    oracle, plain = (gradients(attention_reference, dtype) for dtype in (torch.float64, torch.float32))
    for triple in zip(found, oracle, plain, strict=True):
        assert_close(*triple, factor=GRADIENT_FACTOR)


def test_bits_do_not_depend_on_gradients() -> None:
    q, k, v = heads(1, 4, 2, 30, 30, 16)
    expected = attention(q, k, v, None, 0.25, causal=True)
    found = attention(q.requires_grad_(), k, v, None, 0.25, causal=True)
    assert found.requires_grad
    assert torch.equal(found, expected)
    (first,) = torch.autograd.grad(found.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_stay_where_torch_has_them(value: float) -> None:
    q, k, v = heads(1, 2, 1, 5, 9, 16)
    for changed in (q, k, v):
        kept = changed[0, 1, 3, 2].item()
        changed[0, 1, 3, 2] = value
        found = attention(q, k, v, None, 0.25)
        expected = attention_reference(q, k, v, None, 0.25, False)
        assert torch.equal(found.isfinite(), expected.isfinite())
        changed[0, 1, 3, 2] = kept


@pytest.mark.parametrize("shift", [-1e4, 88.0, 1e4])
def test_large_scores_neither_overflow_nor_vanish(shift: float) -> None:
    q, k, v = heads(1, 2, 1, 5, 200, 16)
    mask = torch.full((1, 1, 5, 200), shift)
    mask[..., ::3] += torch.linspace(-200, 50, 67)
    check(q, k, v, mask, causal=False, scale=0.25)


def test_nothing_in_nothing_out() -> None:
    for batch, tokens, keys in product((0, 1), (0, 3), (0, 4)):
        q, k, v = heads(batch, 2, 1, tokens, keys, 16)
        assert attention(q, k, v, None, 0.25).shape == (batch, tokens, 2, 16)
    q, k, v = heads(1, 2, 1, 3, 0, 16)
    assert torch.equal(attention(q, k, v, None, 0.25), torch.zeros(1, 3, 2, 16)) or not native.is_active()


def test_tensors_that_do_not_fit_are_refused() -> None:
    if not native.is_active():
        return
    q, k, v = heads(2, 4, 2, 6, 6, 16)
    mask = torch.zeros(2, 1, 6, 6)
    bad = [
        (q, k[:1], v, None),
        (q[:, :3], k, v, None),
        (q, k[..., :8], v, None),
        (q, k, v[:, :, :5], None),
        (q, k.bfloat16(), v, None),
        (q, k, v, mask[..., :5]),
        (q, k, v, mask[:, :, :5]),
        (q, k, v, mask.bfloat16()),
        (q, k, v, mask.transpose(2, 3)),
        (q.transpose(2, 3), k.transpose(2, 3), v, None),
    ]
    for arguments in bad:
        assert not fits_native(*arguments)
        with pytest.raises(RuntimeError, match="hfquant: "):
            NATIVE(*arguments, 0.25, False)
    assert fits_native(q, k, v, mask)
    assert not fits_native(q, k, v, mask, 0.25, True)


def test_the_op_is_a_good_citizen_of_torch() -> None:
    q, k, v = heads(1, 4, 2, 6, 6, 16)
    for mask, causal in ((None, True), (torch.rand(1, 1, 6, 6) < 0.9, False)):
        torch.library.opcheck(torch.ops.hfquant.attention, (q, k, v, mask, 0.25, causal))
        torch.library.opcheck(NATIVE, (q, k, v, mask, 0.25, causal))
    compiled = torch.compile(lambda *x: attention(*x, None, 0.25) + 1, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, None, 0.25) + 1)
    expected = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.25)
    torch.testing.assert_close(attention(q, k, v, None, 0.25).transpose(1, 2), expected)

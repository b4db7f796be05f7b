"""What lies between quantized layers, on every instruction set: against float64, or bit for bit where torch is."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hfquant.kernels import native
from hfquant.kernels.gated_product import GATES, gated_product
from hfquant.kernels.gated_product.reference import gated_product_reference
from hfquant.kernels.layers import layout_of
from hfquant.kernels.rms_norm import rms_norm
from hfquant.kernels.rms_norm.reference import rms_norm_reference
from hfquant.kernels.rotary import fits_native, rotary
from hfquant.kernels.rotary.reference import rotary_reference
from tests.support.linear_case import DTYPES, OPS, LinearCase
from tests.support.tolerance import GRADIENT_FACTOR, SAME_VALUES, assert_close


SETS = [*(name for name, usable in native.instruction_sets().items() if usable), "reference"]
SHAPES = [(1,), (7, 3), (2, 3, 64), (5, 576), (1, 1, 2049), (0, 8)]


@pytest.fixture(autouse=True, params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> object:
    with native.selected(request.param):
        yield request.param


def exact_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1 if unit_offset else weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("round_first", [False, True])
def test_rms_norm_is_the_formula(round_first: bool, unit_offset: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
        found = rms_norm(x, weight, 1e-5, unit_offset=unit_offset, round_first=round_first)
        plain = rms_norm_reference(x, weight, 1e-5, unit_offset, round_first)
        assert found.dtype == dtype
        assert_close(found, exact_norm(x, weight, 1e-5, unit_offset=unit_offset), plain)


def test_rms_norm_takes_any_layout_and_values() -> None:
    x, weight = torch.randn(6, 40, 2), torch.randn(40)
    plain = rms_norm(x.transpose(1, 2).contiguous(), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x.transpose(1, 2), weight, 1e-6), plain)
    rows = torch.zeros(4, 40)
    rows[0], rows[1, 3], rows[2, 5] = 1e-30, torch.nan, torch.inf
    found, expected = rms_norm(rows, weight, 1e-6), rms_norm_reference(rows, weight, 1e-6, False, True)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[3], torch.zeros(40))
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", range(len(GATES)), ids=GATES)
def test_gated_products_are_the_formula(kind: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        gate, up = (torch.randn(shape) * 8).to(dtype), torch.randn(shape).to(dtype)
        found = gated_product(gate, up, kind)
        assert found.dtype == dtype
        exact = gated_product_reference(gate.double(), up.double(), kind)
        assert_close(found, exact, gated_product_reference(gate, up, kind))


@pytest.mark.parametrize("kind", range(len(GATES)), ids=GATES)
def test_gates_saturate_as_torch_does(kind: int) -> None:
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])))
    found = gated_product(gate, torch.ones_like(gate), kind)
    expected = gated_product_reference(gate.double(), torch.ones_like(gate).double(), kind)
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(found[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()].float())
    torch.testing.assert_close(found[finite].double(), expected[finite], **SAME_VALUES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_embedding_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    for batch, tokens, size, shared in product((1, 3), (0, 1, 7), (2, 16, 66), (True, False)):
        q = torch.randn(batch, tokens, 4, size).to(dtype).transpose(1, 2)
        k = torch.randn(batch, 2, tokens, size).to(dtype)
        cos, sin = torch.randn(2, 1 if shared else batch, tokens, size).to(dtype)
        expected = rotary_reference(q, k, cos, sin)
        for found, plain in zip(rotary(q, k, cos, sin), expected, strict=True):
            assert torch.equal(found, plain)
            assert min(found.shape) < 2 or found.stride() == plain.stride()
        assert not fits_native(q, k, cos[..., :-1], sin[..., :-1])


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients_of_the_norm(unit_offset: bool) -> None:
    x, weight, grad = torch.randn(3, 5, 48), torch.randn(48), torch.randn(3, 5, 48)

    def gradients(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        function(*leaves).backward(grad.to(dtype))  # type: ignore[operator]
        return [leaf.grad for leaf in leaves]  # type: ignore[misc]

    found = gradients(lambda x, w: rms_norm(x, w, 1e-5, unit_offset=unit_offset), torch.float32)
    oracle = gradients(lambda x, w: exact_norm(x, w, 1e-5, unit_offset=unit_offset), torch.float64)
    plain = gradients(lambda x, w: rms_norm_reference(x, w, 1e-5, unit_offset, True), torch.float32)
    for triple in zip(found, oracle, plain, strict=True):
        assert_close(*triple, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("kind", range(len(GATES)), ids=GATES)
def test_gradients_of_gated_products(kind: int) -> None:
    gate, up, grad = torch.randn(4, 40) * 3, torch.randn(4, 40), torch.randn(4, 40)
    gates = [gate.clone().requires_grad_() for _ in range(2)]
    ups = [up.clone().requires_grad_() for _ in range(2)]
    gated_product(gates[0], ups[0], kind).backward(grad)
    act = functional.silu(gates[1]) if kind == 0 else functional.gelu(gates[1], approximate="tanh")
    (act * ups[1]).backward(grad)
    torch.testing.assert_close(gates[0].grad, gates[1].grad)
    torch.testing.assert_close(ups[0].grad, ups[1].grad)


def mlp_arguments(m: int, k: int, inner: int, layouts: list[tuple[int, str]], dtype: torch.dtype) -> list[object]:
    """Arguments of ``gated_mlp``, the layers of which are quantized as the pairs of bits and kind say."""
    shapes, arguments, code = [(k, inner), (k, inner), (inner, k)], [torch.randn(m, k).to(dtype)], 0
    for index, ((bits, kind), (inputs, outputs)) in enumerate(zip(layouts, shapes, strict=True)):
        case = LinearCase(1, inputs, outputs, bits, None, True, dtype)
        given = case.arguments(kind)
        dynamic, asymmetric = bool(given.get("dynamic")), bool(given.get("asymmetric"))
        arguments += [*case.packed, given.get("input_scale"), case.bias if index else None]
        code |= layout_of(bits, dynamic=dynamic, asymmetric=asymmetric) << 8 * index
    return [*arguments, code, index % len(GATES)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_mlp_is_its_layers(dtype: torch.dtype) -> None:
    for m, layouts in product(
        (1, 5, 13),
        ([(8, "dynamic-asym")] * 3, [(4, "weight_only"), (8, "static"), (4, "dynamic")], [(8, "weight_only")] * 3),
    ):
        x, *rest, layouts_code, kind = mlp_arguments(m, 48, 80, layouts, dtype)
        found = torch.ops.hfquant.gated_mlp(x, *rest, layouts_code, kind)

        def layer(values: Tensor, index: int, parts: list[object] = rest, layouts: list[object] = layouts) -> Tensor:
            *packed, scale, bias = parts[index * 5 : index * 5 + 5]
            bits, how = layouts[index]
            flags = {"dynamic": how.startswith("dynamic"), "asymmetric": how == "dynamic-asym"}
            return OPS[bits](values, *packed, input_scale=scale, bias=bias, **flags)

        assert torch.equal(found, layer(gated_product(layer(x, 0), layer(x, 1), kind), 2))


def test_the_ops_are_well_formed() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.hfquant.rms_norm.default, (x, weight, 1e-5, False, True))
    torch.library.opcheck(torch.ops.hfquant.gated_product.default, (x, torch.randn(3, 8, requires_grad=True), 1))
    heads = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    torch.library.opcheck(torch.ops.hfquant.rotary.default, heads)
    arguments = mlp_arguments(2, 16, 24, [(8, "dynamic")] * 3, torch.float32)
    torch.library.opcheck(torch.ops.hfquant.gated_mlp.default, tuple(arguments))

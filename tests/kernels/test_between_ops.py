"""What lies between quantized layers, on every instruction set: against float64, or bit for bit where torch is."""

from functools import partial
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
from tests.support.tolerance import GELU, GRADIENT_FACTOR, SAME_VALUES, TORCH_GELU, assert_close


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
    special = [torch.nan, 0.0, -0.0]
    if GATES[kind] != "gelu" or native.is_active():  # torch's GELU of infinity is NaN in long tensors
        special += [torch.inf, -torch.inf]
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor(special)))
    found = gated_product(gate, torch.ones_like(gate), kind)
    expected = gated_product_reference(gate.double(), torch.ones_like(gate).double(), kind)
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(found[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()].float())
    torch.testing.assert_close(found[finite].double(), expected[finite], **SAME_VALUES)


@pytest.mark.parametrize("kind", [GATES.index("gelu"), GATES.index("gelu_tanh")])
def test_gelu_errs_by_little_more_than_its_rounding(kind: int) -> None:
    x = torch.cat((torch.linspace(-12, 12, 300_001), torch.linspace(-1e-3, 1e-3, 1001)))
    found = gated_product(x, torch.ones_like(x), kind).double()
    exact = gated_product_reference(x.double(), torch.ones_like(x).double(), kind)
    torch.testing.assert_close(found, exact, **(GELU if native.is_active() else TORCH_GELU))


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
    act = [functional.silu, partial(functional.gelu, approximate="tanh"), functional.gelu][kind]
    (act(gates[1]) * ups[1]).backward(grad)
    torch.testing.assert_close(gates[0].grad, gates[1].grad)
    torch.testing.assert_close(ups[0].grad, ups[1].grad)


Layouts = list[tuple[int, str]]
LAYOUTS: list[Layouts] = [
    [(8, "dynamic-asym")] * 3,
    [(4, "weight_only"), (8, "static"), (4, "dynamic")],
    [(4, "dynamic"), (4, "dynamic"), (8, "dynamic")],
    [(8, "weight_only")] * 3,
    [(4, "weight_only")] * 3,
]


class Layers:
    """Packed layers as arguments of ops that take several, and as functions."""

    def __init__(self, shapes: list[tuple[int, int]], layouts: Layouts, dtype: torch.dtype) -> None:
        self.tensors: list[Tensor | None] = []
        self.layouts, self.kinds = 0, layouts
        for index, ((bits, kind), (inputs, outputs)) in enumerate(zip(layouts, shapes, strict=True)):
            case = LinearCase(1, inputs, outputs, bits, 16 if bits == 4 else None, True, dtype)
            given = case.arguments(kind)
            self.tensors += [*case.packed, given.get("input_scale"), case.bias if index else None]
            layout = layout_of(bits, dynamic=kind.startswith("dynamic"), asymmetric=kind == "dynamic-asym")
            self.layouts |= layout << 8 * index

    def __call__(self, x: Tensor, index: int) -> Tensor:
        *packed, scale, bias = self.tensors[index * 5 : index * 5 + 5]
        bits, kind = self.kinds[index]
        flags = {"dynamic": kind.startswith("dynamic"), "asymmetric": kind == "dynamic-asym"}
        return OPS[bits](x, *packed, input_scale=scale, bias=bias, **flags)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_a_gated_mlp_is_its_layers(layouts: Layouts, dtype: torch.dtype) -> None:
    for m, kind in product((1, 5, 13), range(len(GATES))):
        layers, x = Layers([(48, 80), (48, 80), (80, 48)], layouts, dtype), torch.randn(m, 48).to(dtype)
        found = torch.ops.hfquant.gated_mlp(x, *layers.tensors, layers.layouts, kind)
        assert torch.equal(found, layers(gated_product(layers(x, 0), layers(x, 1), kind), 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_an_activated_linear_is_its_layer(layouts: Layouts, dtype: torch.dtype) -> None:
    for m, kind in product((1, 5, 13), range(len(GATES))):
        layers, x = Layers([(48, 83)], layouts[:1], dtype), (torch.randn(m, 48) * 4).to(dtype)
        found = torch.ops.hfquant.activated_linear(x, *layers.tensors, layers.layouts, kind)
        assert torch.equal(found, gated_product(layers(x, 0), None, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_rotated_heads_are_their_layers(layouts: Layouts, dtype: torch.dtype) -> None:
    size = 16
    for (batch, tokens), shared in product(((1, 1), (2, 3), (1, 13)), (True, False)):
        layers = Layers([(48, 4 * size), (48, 2 * size), (48, 2 * size)], layouts, dtype)
        x = torch.randn(batch, tokens, 48).to(dtype)
        cos, sin = torch.randn(2, 1 if shared else batch, tokens, size).to(dtype)
        found = torch.ops.hfquant.rotated_heads(x, *layers.tensors, cos, sin, layers.layouts, size)
        q, k, v = (layers(x, index).unflatten(-1, (-1, size)).transpose(1, 2) for index in range(3))
        for ours, plain in zip(found, (*rotary(q, k, cos, sin), v), strict=True):
            assert torch.equal(ours, plain)
            assert ours.shape == plain.shape


def test_rows_may_be_many() -> None:
    for bits, kind in ((8, "dynamic-asym"), (8, "weight_only"), (4, "dynamic")):
        layers, x = Layers([(64, 40)], [(bits, kind)], torch.float32), torch.randn(2100, 64)
        found = layers(x, 0)
        for start in (0, 1000, 1008, 2016, 2090):
            assert torch.equal(found[start : start + 10], layers(x[start : start + 10], 0))


def test_the_ops_are_well_formed() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.hfquant.rms_norm.default, (x, weight, 1e-5, False, True))
    torch.library.opcheck(torch.ops.hfquant.gated_product.default, (x, torch.randn(3, 8, requires_grad=True), 1))
    heads = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    torch.library.opcheck(torch.ops.hfquant.rotary.default, heads)
    torch.library.opcheck(torch.ops.hfquant.gated_product.default, (x, None, 2))
    layers, x = Layers([(16, 24), (16, 24), (24, 16)], [(8, "dynamic")] * 3, torch.float32), torch.randn(1, 2, 16)
    ops = torch.ops.hfquant
    torch.library.opcheck(ops.gated_mlp.default, (x, *layers.tensors, layers.layouts, 1))
    torch.library.opcheck(ops.activated_linear.default, (x, *layers.tensors[:5], layers.layouts & 255, 1))
    layers = Layers([(16, 16), (16, 8), (16, 8)], [(8, "dynamic")] * 3, torch.float32)
    angles = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    torch.library.opcheck(ops.rotated_heads.default, (x, *layers.tensors, *angles, layers.layouts, 8))

"""The ops of quantization-aware training: what they compute, save and derive."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hfquant.kernels.fake_quant_embedding import fake_quant_embedding
from hfquant.kernels.fake_quant_linear import GridWeight, fake_quant_linear
from hfquant.kernels.int8_linear.reference import quant_linear_reference
from hfquant.numerics.affine import scale_from_bits, scale_to_bits
from hfquant.numerics.packing import pack, unpack
from hfquant.numerics.straight_through import row_codes
from hfquant.ptq.quantize_weight import quantize_weight
from hfquant.schemes import WeightScheme
from tests.support.linear_case import KINDS
from tests.support.straight_through import clipped
from tests.support.tolerance import GRADIENT_FACTOR, assert_close


N, K, M, R = 12, 64, 7, 4
STEP = torch.tensor([0.02]).bfloat16().float()
GRIDS = [(4, 16, True), (4, None, True), (4, 16, False), (8, None, True), (8, 32, False)]


def grid_of(weight: Tensor, bits: int, group: int | None, symmetric: bool, *, lora: bool = False) -> GridWeight:
    packed = quantize_weight(weight, WeightScheme(bits, group, symmetric), algorithm="rtn", name="w").packed
    scale = scale_from_bits(packed.weight_scale) * 0.75  # so that some weights are clipped
    scale = scale.bfloat16().float()
    zero = packed.weight_zero_point
    zero = None if zero is None else unpack(zero, bits=bits, length=scale.shape[-1])
    a, b = (torch.randn(R, K) * 0.1, torch.randn(N, R) * 0.1) if lora else (None, None)
    leaves = [weight.clone().requires_grad_(), torch.zeros_like(scale).requires_grad_()]
    adapters = [None if t is None else t.requires_grad_() for t in (a, b)]
    return GridWeight(*leaves, scale, zero, None, *adapters)


def arguments(kind: str) -> dict[str, Any]:
    if kind == "static":
        return {"input_scale": STEP.clone(), "input_log_scale": torch.zeros(1, requires_grad=True)}
    return {"dynamic": kind.startswith("dynamic"), "asymmetric": kind == "dynamic-asym"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
@pytest.mark.parametrize("lora", [False, True])
def test_forward_is_the_deployed_formula(
    bits: int, group: int | None, symmetric: bool, kind: str, dtype: torch.dtype, lora: bool
) -> None:
    grid, x, bias = grid_of(torch.randn(N, K), bits, group, symmetric, lora=lora), torch.randn(M, K), torch.randn(N)
    x = x.to(dtype)
    given = arguments(kind)
    out = fake_quant_linear(x, grid, bits=bits, bias=bias, lora_factor=0.5, **given)
    weight = grid.weight + (0.5 * (grid.lora_b @ grid.lora_a) if lora else 0)
    codes = row_codes(weight.detach(), grid.scale, grid.zero_point, bits=bits)
    zero = None if grid.zero_point is None else pack(grid.zero_point, bits=bits)
    flags = (kind.startswith("dynamic"), kind == "dynamic-asym")
    static = scale_to_bits(given["input_scale"]) if kind == "static" else None
    packed = (pack(codes, bits=bits), scale_to_bits(grid.scale), zero)
    deployed = quant_linear_reference(x, *packed, static, bias.to(dtype), *flags, bits=bits)
    assert out.dtype == dtype
    assert torch.equal(out, deployed)
    kept = fake_quant_linear(x, grid._replace(codes=codes), bits=bits, bias=bias, lora_factor=0.5, **given)
    assert torch.equal(kept, out)


def formula_gradients(grid: GridWeight, x: Tensor, grad: Tensor, bits: int, kind: str, blend: float, dtype) -> list:
    """Autograd of the formula, straight through every rounding, in ``dtype``."""
    leaves = {
        name: t.detach().to(dtype).requires_grad_()
        for name, t in {"x": x, **grid._asdict()}.items()
        if t is not None and name in ("x", "weight", "log_scale", "lora_a", "lora_b")
    }
    weight = leaves["weight"]
    if "lora_a" in leaves:
        weight = weight + 0.5 * leaves["lora_b"] @ leaves["lora_a"]
    scale = (grid.scale.to(dtype) * leaves["log_scale"].exp()).unsqueeze(-1)
    shift = 0.0 if grid.zero_point is None else grid.zero_point.to(dtype).unsqueeze(-1)
    values = (_straight(weight.view(N, -1, K // scale.shape[1]) / scale, bits, shift) - shift) * scale
    weight = weight + blend * (values.flatten(-2) - weight)
    inputs, u = leaves["x"], torch.zeros(1, dtype=dtype, requires_grad=True)
    if kind != "weight_only":
        fixed, code_of_zero = inputs.detach(), 0.0
        step = fixed.abs().amax(-1, keepdim=True) / 127
        if kind == "dynamic-asym":
            low = fixed.amin(-1, keepdim=True).clamp(max=0)
            step = (fixed.amax(-1, keepdim=True).clamp(min=0) - low) / 255
            code_of_zero = -128 - torch.round(low / step)
        elif kind == "static":
            step = STEP.to(dtype) * u.exp()
        values = _straight(inputs / step, 8, code_of_zero) - code_of_zero
        if kind == "dynamic-asym":  # the ends of the range can round to a code beyond the last; gradients go through
            values = inputs / step + (values - inputs / step).detach()
        inputs = inputs + blend * (values * step - inputs)
    (inputs @ weight.t() * grad.to(dtype)).sum().backward()
    wanted = ["x", "log_scale"] + (["lora_a", "lora_b"] if "lora_a" in leaves else ["weight"])
    return [leaves[name].grad for name in wanted] + ([u.grad] if kind == "static" else [])


def _straight(x: Tensor, bits: int, shift: Tensor | float = 0.0) -> Tensor:
    return clipped(x + (torch.round(x) - x).detach() + shift, bits)


@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_gradients_are_those_of_the_formula(
    bits: int, group: int | None, symmetric: bool, kind: str, lora: bool, blend: float
) -> None:
    grid = grid_of(torch.randn(N, K), bits, group, symmetric, lora=lora)
    if lora:
        grid.weight.requires_grad_(False)
    x, grad, given = torch.randn(M, K, requires_grad=True), torch.randn(M, N), arguments(kind)
    bias = torch.randn(N, requires_grad=True)
    out = fake_quant_linear(x, grid, bits=bits, bias=bias, lora_factor=0.5, blend=blend, **given)
    (out * grad).sum().backward()
    leaves = [x, grid.log_scale] + ([grid.lora_a, grid.lora_b] if lora else [grid.weight])
    leaves += [given["input_log_scale"]] if kind == "static" else []
    oracle, plain = (formula_gradients(grid, x, grad, bits, kind, blend, d) for d in (torch.float64, torch.float32))
    for leaf, exact, single in zip(leaves, oracle, plain, strict=True):
        assert_close(leaf.grad, exact, single, factor=GRADIENT_FACTOR)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_nothing_is_saved_but_inputs() -> None:
    grid, x = grid_of(torch.randn(N, K), 4, 16, True), torch.randn(M, K, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        fake_quant_linear(x, grid, bits=4)
    assert set(saved) == {x.data_ptr(), grid.weight.data_ptr(), grid.scale.data_ptr()}


def test_ops_are_well_formed() -> None:
    grid, x = grid_of(torch.randn(N, K), 4, 16, False, lora=True), torch.randn(M, K, requires_grad=True)
    static = (torch.zeros(1, requires_grad=True), STEP)
    given = (x, *grid, *static, torch.randn(N, requires_grad=True), 0.5, False, False, 4, 0.5)
    torch.library.opcheck(torch.ops.hfquant.fake_quant_linear.default, given)
    ids = torch.tensor([[1, 3], [3, 0]])
    torch.library.opcheck(torch.ops.hfquant.fake_quant_embedding.default, (ids, *grid[:4], -1, 4, 1.0, torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding_gradients_are_summed_over_ids(symmetric: bool) -> None:
    grid = grid_of(torch.randn(N, K), 4, 16, symmetric)
    ids, grad = torch.tensor([[2, 5, 2], [0, 1, 11]]), torch.randn(2, 3, K)
    out = fake_quant_embedding(ids, grid, bits=4, dtype=torch.float32, padding_idx=1)
    (out * grad).sum().backward()
    embedded = [grid.weight.grad.clone(), grid.log_scale.grad.clone()]
    grid.weight.grad = grid.log_scale.grad = None
    one_hot = torch.nn.functional.one_hot(ids, N).float()
    one_hot[1, 1] = 0
    whole = fake_quant_linear(torch.eye(K), grid, bits=4).t()  # all rows of the table
    (one_hot @ whole * grad).sum().backward()
    assert torch.equal(out[0, 0], whole[2])
    torch.testing.assert_close(embedded, [grid.weight.grad, grid.log_scale.grad])
    assert not embedded[0][1].any()


def test_a_compiler_keeps_the_op_whole() -> None:
    grid, x = grid_of(torch.randn(N, K), 4, 16, True), torch.randn(M, K, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return fake_quant_linear(torch.nn.functional.silu(x), grid, bits=4).square().mean()

    expected = loss(x)
    expected.backward()
    grads = [t.grad.clone() for t in (x, grid.weight, grid.log_scale)]
    x.grad = grid.weight.grad = grid.log_scale.grad = None
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    found.backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(a, t.grad) for a, t in zip(grads, (x, grid.weight, grid.log_scale), strict=True))

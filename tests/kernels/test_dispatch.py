"""Which implementation runs, what is said when the fastest cannot, and ops on devices that are not here."""

import warnings

import pytest
import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels import dispatch
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.expert_linear import expert_linear
from hfquant.kernels.fake_quantize import fake_quantize
from hfquant.kernels.grid_weight import grid_weight
from hfquant.kernels.quant_embedding import quant_embedding
from hfquant.kernels.quantize_rows import quantize_rows
from hfquant.numerics import affine
from hfquant.numerics.packing import pack, unpack
from tests.support.linear_case import DTYPES, KINDS, LinearCase
from tests.support.processes import run_python
from tests.support.straight_through import clipped
from tests.support.tolerance import GRADIENT_FACTOR, assert_close


def implementation(name: str, unavailable: str | None = None, refuses: str | None = None) -> dispatch.Implementation:
    return dispatch.Implementation(name, lambda: lambda x: name, lambda device: unavailable, lambda x: refuses)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dispatch, "_REFERENCES", {"op": lambda x: "reference"})
    monkeypatch.setattr(dispatch, "_IMPLEMENTATIONS", {})
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    dispatch._warn.cache_clear()
    return "op"


def test_the_first_that_nothing_speaks_against_runs(op: str) -> None:
    x = torch.ones(1)
    assert dispatch.run(op, x) == "reference"
    dispatch.register_implementation(op, "cuda", implementation("elsewhere"))
    dispatch.register_implementation(op, "cpu", implementation("avx512", unavailable="no AVX-512 here"))
    dispatch.register_implementation(op, "cpu", implementation("avx2", refuses="x is odd"))
    dispatch.register_implementation(op, "cpu", implementation("scalar"))
    with pytest.warns(RuntimeWarning) as said:
        assert dispatch.run(op, x) == "scalar"
    assert [str(warning.message).partition(": ")[2] for warning in said] == ["no AVX-512 here", "x is odd"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.run(op, x) == "scalar"  # said once
    chosen = {choice.device: choice for choice in dispatch.choices()}
    assert chosen["cpu"] == dispatch.Choice(op, "cpu", "avx2", "avx512: no AVX-512 here")
    assert chosen["cuda"].implementation == "elsewhere"


def test_the_reference_can_be_asked_for(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.register_implementation(op, "cpu", implementation("scalar"))
    assert dispatch.run(op, torch.ones(1)) == "scalar"
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    assert dispatch.run(op, torch.ones(1)) == "reference"
    assert all(choice.reason == "HFQUANT_KERNELS=reference" for choice in dispatch.choices())


def test_without_triton_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    unavailable = dispatch.triton_unavailable.__wrapped__
    assert "Triton cannot be imported: No module named 'triton'" in unavailable(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or newer, this one has 7.5" in unavailable(torch.device("cuda", 0))


def test_nothing_imports_triton_without_a_gpu() -> None:
    program = (
        "import sys, builtins\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import torch, hfquant, hfquant.cli.main\n"
        "from hfquant.cli.kernels import kernels\n"
        "kernels(json=True)\n"
        "assert not any(name.endswith('.triton') for name in sys.modules if name.startswith('hfquant'))\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"op": "int4_linear"' in done.stdout


def test_ops_know_their_shapes_on_devices_that_are_not_here() -> None:
    with torch._subclasses.FakeTensorMode():
        make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="cuda")  # noqa: E731
        packed = make(64, 16, dtype=torch.int32), make(64, 4, dtype=torch.int16), None
        x, experts = make(2, 3, 128), (packed[0].unsqueeze(0), packed[1].unsqueeze(0))
        outputs = [
            torch.ops.hfquant.int4_linear(x, *packed, None, make(64), False, False),
            torch.ops.hfquant.int8_linear(x, make(64, 32, dtype=torch.int32), packed[1], None, None, None, True, True),
            dequantize_weight(*packed, bits=4, in_features=128, dtype=torch.bfloat16),
            quant_embedding(make(2, 3, dtype=torch.int64), *packed, bits=4, embedding_dim=128, dtype=torch.bfloat16),
            quantize_rows(x)[0],
            fake_quantize(make(64, 128), make(64, 4, dtype=torch.float32), bits=4),
            grid_weight(packed[0], packed[0], make(64, 128), make(64, 4, dtype=torch.float32), dtype=torch.bfloat16),
            expert_linear(make(3, 128), make(1, dtype=torch.int32), *experts, bits=4),
        ]
    shapes = [(2, 3, 64), (2, 3, 64), (64, 128), (2, 3, 128), (2, 3, 128), (64, 128), (64, 128), (3, 64)]
    assert [tuple(out.shape) for out in outputs] == shapes
    assert all(out.device.type == "cuda" for out in outputs)


def grid_case(n: int, k: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, residual = (torch.randint(-8, 8, (n, k), dtype=torch.int8) for _ in range(2))
    scale = affine.round_scale(torch.randn(n, k // group) / 16)
    return pack(codes, bits=4), pack(residual, bits=4), (torch.randn(n, k) * 3).to(dtype), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 96), (8, 24)], ids=str)
def test_fake_quantize_is_the_grid_with_straight_through_gradients(bits: int, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 96).to(dtype)
    grouped = x.float().view(5, -1, group)
    scale = affine.choose_scale(grouped, bits=bits) * 0.7  # some values are clipped
    scale, zero = affine.round_scale(scale), torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    for shift in (None, zero):
        wide = None if shift is None else shift.unsqueeze(-1)
        expected = affine.fake_quantize(grouped, scale.unsqueeze(-1), wide, bits=bits).to(dtype).view_as(x)
        leaf, leaf_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out, upstream = fake_quantize(leaf, leaf_scale, shift, bits=bits), torch.randn(5, 96).to(dtype)
        assert torch.equal(out, expected)
        out.backward(upstream)
        oracle = straight_through_gradients(x.double(), scale.double(), wide, upstream.double(), bits)
        plain = straight_through_gradients(x.float(), scale, wide, upstream.float(), bits)
        assert_close(leaf.grad, oracle[0], plain[0], factor=GRADIENT_FACTOR)
        assert_close(leaf_scale.grad, oracle[1], plain[1], factor=GRADIENT_FACTOR)


def straight_through_gradients(
    x: Tensor, scale: Tensor, zero: Tensor | None, upstream: Tensor, bits: int
) -> list[Tensor]:
    """Gradients by autograd of the formula, with the rounding taken as the identity; its codes are float32's."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    quotient = x.view(*scale.shape, -1) / scale.unsqueeze(-1)
    rounded = quotient + (quotient.float().round().to(x.dtype) - quotient).detach()
    shift = 0 if zero is None else zero.to(x.dtype)
    values = (clipped(rounded + shift, bits) - shift) * scale.unsqueeze(-1)
    values.view_as(x).backward(upstream)
    return [x.grad, scale.grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_weight_rounds_codes_residual_and_delta_together(dtype: torch.dtype) -> None:
    codes, residual, delta, scale = grid_case(6, 64, 16, dtype)
    leaf, leaf_scale = delta.clone().requires_grad_(), scale.clone().requires_grad_()
    out = grid_weight(codes, residual, leaf, leaf_scale, dtype=torch.float32)
    steps = unpack(codes, bits=4, length=64).double() + unpack(residual, bits=4, length=64).double() / 16
    steps = (steps + delta.double()).float().round()
    wide, clipped = scale.repeat_interleave(16, 1), steps.clamp(-8, 7)
    assert torch.equal(out, clipped * wide)
    upstream = torch.randn(6, 64)
    out.backward(upstream)
    assert torch.equal(leaf.grad, (upstream * wide * (steps == clipped)).to(dtype))
    oracle, plain = (upstream.double() * clipped).view(6, 4, 16).sum(-1), (upstream * clipped).view(6, 4, 16).sum(-1)
    assert_close(leaf_scale.grad, oracle, plain, factor=GRADIENT_FACTOR)
    untouched = grid_weight(codes, None, torch.zeros(6, 64), scale, dtype=torch.float32)
    packed = codes, affine.scale_to_bits(scale), None
    assert torch.equal(untouched, dequantize_weight(*packed, bits=4, in_features=64, dtype=torch.float32))


def test_new_ops_refuse_what_does_not_fit() -> None:
    codes, residual, delta, scale = grid_case(6, 64, 16, torch.float32)
    with pytest.raises(KernelError, match=r"codes \[6, 8\] and scales \[5, 4\] do not fit delta \[6, 64\]"):
        grid_weight(codes, residual, delta, scale[:5], dtype=torch.float32)
    with pytest.raises(KernelError, match=r"scales \[6, 5\] do not fit values \[6, 64\]"):
        fake_quantize(delta, torch.ones(6, 5), bits=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_linears_one_after_the_other(bits: int, kind: str) -> None:
    cases = [LinearCase(12, 64, 5, bits, None if bits == 8 else 32) for _ in range(3)]
    packed = [torch.stack([case.packed[i] for case in cases]) for i in range(2)]
    bias = torch.stack([case.bias for case in cases]).requires_grad_()
    x, ends = cases[0].x.clone().requires_grad_(), torch.tensor([5, 5, 9], dtype=torch.int32)
    out = expert_linear(x, ends, *packed, bits=bits, bias=bias, **cases[0].arguments(kind))
    assert torch.equal(out[:5], cases[0].run(x[:5], kind, bias=bias[0]))
    assert torch.equal(out[5:9], cases[2].run(x[5:9], kind, bias=bias[2]))
    assert bool((out[9:] == 0).all())
    out.sum().backward()
    expected = cases[2].weight.sum(0).expand(4, 64)
    assert_close(x.grad[5:9], expected, expected.float(), factor=GRADIENT_FACTOR)
    assert bool((x.grad[9:] == 0).all())
    assert torch.equal(bias.grad, torch.tensor([5.0, 0.0, 4.0]).unsqueeze(1).expand(3, 5))


def test_opcheck_of_the_new_ops() -> None:
    case = LinearCase(6, 64, 5, 4, 32)
    codes, residual, delta, scale = grid_case(6, 64, 16, torch.float32)
    zero, ends = torch.ones(6, 4, dtype=torch.int8), torch.tensor([4], dtype=torch.int32)
    experts = *(tensor[None] for tensor in case.packed[:2]), None, None
    ops = torch.ops.hfquant
    calls = [
        (ops.fake_quantize.default, (delta.requires_grad_(), scale.requires_grad_(), zero, 4)),
        (ops.fake_quantize_backward.default, (torch.ones(6, 64), delta.detach(), scale.detach(), None, 4)),
        (ops.grid_weight.default, (codes, residual, delta, scale, None, 4, torch.bfloat16)),
        (ops.grid_weight_backward.default, (torch.ones(6, 64), codes, None, delta.detach(), scale.detach(), None, 4)),
        (
            ops.expert_linear.default,
            (case.x.requires_grad_(), ends, *experts, case.bias[None].requires_grad_(), False, False, 4),
        ),
    ]
    for op, arguments in calls:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}

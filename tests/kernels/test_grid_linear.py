"""The op of quantized fine-tuning: its values are those of the deployed op, its gradients those of the formula."""

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels.grid_linear import GridAdapter, grid_linear
from hfquant.kernels.grid_linear.reference import codes_now, lora_steps, scale_now
from hfquant.kernels.grid_weight import grid_weight
from hfquant.nn.quant_linear import LINEAR_OPS
from hfquant.numerics.affine import code_range, scale_from_bits, scale_to_bits
from hfquant.numerics.packing import pack, unpack
from tests.support.straight_through import clipped
from tests.support.tolerance import GRADIENT_FACTOR, assert_close


pytestmark = pytest.mark.usefixtures("reference_kernels")

KINDS = ["weight_only", "dynamic", "dynamic-asym", "static"]
N, K, GROUP, R, FACTOR = 6, 64, 16, 3, 0.5


@dataclass
class Case:
    """A packed weight ``[6, 64]`` in groups of 16 with everything that trains on it, and input for it."""

    bits: int
    kind: str
    symmetric: bool = True
    lora: bool = True
    residual: bool = True
    dtype: torch.dtype = torch.float32
    rounded: bool = True
    trains: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = code_range(self.bits)
        make = torch.randint
        self.codes = pack(make(low, high + 1, (N, K), dtype=torch.int8), bits=self.bits)
        sign = torch.tensor([-1.0, 1.0])[torch.randint(2, (N, K // GROUP))]
        self.scale = scale_to_bits((torch.rand(N, K // GROUP) / 8 + 0.1) * sign)
        self.zero = (
            None if self.symmetric else pack(make(low, high + 1, (N, K // GROUP), dtype=torch.int8), bits=self.bits)
        )
        self.kept = pack(make(-7, 8, (N, K), dtype=torch.int8), bits=4) if self.residual else None
        wide = torch.promote_types(self.dtype, torch.float32)
        self.trains = {
            "log_scale": torch.randn(N, K // GROUP, dtype=wide) / 8,
            "bias": torch.randn(N, dtype=self.dtype),
        }
        if self.lora:
            self.trains |= {"a": torch.randn(R, K, dtype=wide) / 4, "b": torch.randn(N, R, dtype=wide)}
        self.trains["x"] = torch.randn(5, K, dtype=self.dtype)
        self.input_scale = scale_to_bits(torch.tensor([0.01])) if self.kind == "static" else None
        if self.kind == "static":
            self.trains["input_log_scale"] = torch.tensor([0.1], dtype=wide)

    def adapter(self, given: dict[str, Tensor]) -> GridAdapter:
        lora = given.get("a"), given.get("b")
        return GridAdapter(self.codes, self.scale, self.zero, given["log_scale"], self.kept, *lora)

    def run(self, given: dict[str, Tensor]) -> Tensor:
        arguments = {"lora_factor": FACTOR, "bits": self.bits, "bias": given["bias"], **flags(self.kind)}
        arguments["rounded"] = self.rounded
        if self.kind == "static":
            arguments |= {"input_scale": self.input_scale, "input_log_scale": given["input_log_scale"]}
        return grid_linear(given["x"], self.adapter(given), **arguments)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in self.trains.items()}

    def formula(self, given: dict[str, Tensor]) -> Tensor:
        """The layer in plain autograd, in the dtype of ``given``: straight through every rounding."""
        dtype = given["x"].dtype
        scale = learned(self.current_scale(), given["log_scale"])
        steps = unpack(self.codes, bits=self.bits, length=K).to(dtype)
        if self.lora:
            initial = scale_from_bits(self.scale).repeat_interleave(GROUP, 1)
            steps = steps + FACTOR * given["b"] @ given["a"] / initial
            if self.kept is not None:
                steps = steps + unpack(self.kept, bits=4, length=K).to(dtype) / 16
        if self.rounded:
            # the rounded steps are the op's own, so that a tie cannot fall to the other side in another dtype
            steps = clipped(through(self.steps(), steps), self.bits)
        else:
            scale = scale.detach()  # scales wait for the rounding
        if self.zero is not None:
            steps = steps - unpack(self.zero, bits=self.bits, length=K // GROUP).repeat_interleave(GROUP, 1)
        weight = steps * scale.repeat_interleave(GROUP, 1)
        return self.activations(given) @ weight.t() + given["bias"]

    def activations(self, given: dict[str, Tensor]) -> Tensor:
        x = given["x"]
        if self.kind == "weight_only":
            return x
        if self.kind == "dynamic-asym":
            fixed = self.trains["x"].float()
            low = fixed.amin(-1, keepdim=True).clamp(max=0)
            scale = (fixed.amax(-1, keepdim=True).clamp(min=0) - low) / 255
            zero = (-128 - (low / scale).round()).clamp(-128, 127)
            rounded = ((fixed / scale).round() + zero).clamp(-128, 127) - zero
            return through(rounded, x / scale.to(x.dtype)) * scale.to(x.dtype)
        if self.kind == "dynamic":
            scale = (self.trains["x"].float().abs().amax(-1, keepdim=True) / 127).to(x.dtype)
            rounded = (self.trains["x"].float() / scale.float()).round().clamp(-128, 127)
            return through(rounded, x / scale) * scale
        stored = scale_now(self.input_scale, self.trains["input_log_scale"])
        scale = learned(stored, given["input_log_scale"])
        return clipped(through((self.trains["x"].float() / stored).round(), x / scale), 8) * scale

    def current_scale(self) -> Tensor:
        return scale_now(self.scale, self.trains["log_scale"])

    def steps(self) -> Tensor:
        steps = unpack(self.codes, bits=self.bits, length=K).float()
        if not self.lora:
            return steps
        if self.kept is not None:
            steps = steps + unpack(self.kept, bits=4, length=K) / 16
        return (steps + lora_steps(self.trains["a"], self.trains["b"], FACTOR, self.scale)).round()


def flags(kind: str) -> dict[str, bool]:
    """How the op is told to quantize activations at run time."""
    return {"dynamic": kind.startswith("dynamic"), "asymmetric": kind == "dynamic-asym"}


def learned(scale: Tensor, log_scale: Tensor) -> Tensor:
    """``scale``, rounded as it is, with the gradient of ``scale * exp(u - u)``."""
    return scale.to(log_scale.dtype) * torch.exp(log_scale - log_scale.detach())


def through(value: Tensor, passes: Tensor) -> Tensor:
    """``value`` with the gradient of ``passes``."""
    return passes + (value.to(passes.dtype) - passes).detach()


torch.manual_seed(0)  # one draw in 200 is beyond a bound of this page, and what was imported before decided which
CASES = [Case(b, k, symmetric=s, lora=l) for b, k, s, l in product([4, 8], KINDS, [True, False], [True, False])]
UNROUNDED = [Case(b, k, symmetric=s, rounded=False) for b, k, s in product([4, 8], KINDS, [True, False])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"int{c.bits}-{c.kind}-{c.symmetric}-{c.lora}")
def test_values_are_those_of_the_merged_weight(case: Case, dtype: torch.dtype) -> None:
    case = Case(case.bits, case.kind, case.symmetric, case.lora, dtype=dtype)
    out = case.run(case.trains)
    delta = lora_steps(case.trains.get("a"), case.trains.get("b"), FACTOR, case.scale)
    codes = codes_now(case.codes, case.kept, delta, bits=case.bits, length=K)
    assert torch.equal(codes, case.steps().clamp(*code_range(case.bits)).to(torch.int8))
    merged = pack(codes, bits=case.bits), scale_to_bits(case.current_scale()), case.zero
    arguments = {"bias": case.trains["bias"], **flags(case.kind)}
    if case.kind == "static":
        arguments["input_scale"] = scale_to_bits(scale_now(case.input_scale, case.trains["input_log_scale"]))
    assert torch.equal(out, LINEAR_OPS[case.bits](case.trains["x"], *merged, **arguments))


@pytest.mark.parametrize("case", UNROUNDED, ids=lambda c: f"int{c.bits}-{c.kind}-{c.symmetric}")
def test_without_rounding_it_computes_with_what_would_be_rounded(case: Case) -> None:
    oracle, plain = case.leaves(torch.float64), case.leaves()
    assert_close(case.run(case.trains), case.formula(oracle), case.formula(plain))
    rounded = Case(case.bits, case.kind, case.symmetric)
    rounded.__dict__.update(case.__dict__ | {"rounded": True})
    assert not torch.allclose(rounded.run(case.trains), case.run(case.trains), rtol=1e-3)
    case_without = Case(case.bits, case.kind, case.symmetric, lora=False, rounded=False)
    values = case_without.run(case_without.trains)  # no adapter: nothing is rounded
    case_without.rounded = True
    assert torch.equal(values, case_without.run(case_without.trains))


@pytest.mark.parametrize("case", UNROUNDED, ids=lambda c: f"int{c.bits}-{c.kind}-{c.symmetric}")
def test_gradients_without_rounding_are_those_of_the_formula_in_float64(case: Case) -> None:
    found, oracle, plain = case.leaves(), case.leaves(torch.float64), case.leaves()
    upstream = torch.randn(5, N)
    case.run(found).backward(upstream)
    case.formula(oracle).backward(upstream.double())
    case.formula(plain).backward(upstream)
    assert bool((found.pop("log_scale").grad == 0).all())
    for name, leaf in found.items():
        assert bool((leaf.grad != 0).any()), name
        assert_close(leaf.grad, oracle[name].grad, plain[name].grad, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"int{c.bits}-{c.kind}-{c.symmetric}-{c.lora}")
def test_gradients_are_those_of_the_formula_in_float64(case: Case) -> None:
    found, oracle, plain = case.leaves(), case.leaves(torch.float64), case.leaves()
    upstream = torch.randn(5, N)
    case.run(found).backward(upstream)
    case.formula(oracle).backward(upstream.double())
    case.formula(plain).backward(upstream)
    assert set(found) == {"x", "log_scale", "bias"} | ({"a", "b"} if case.lora else set()) | (
        {"input_log_scale"} if case.kind == "static" else set()
    )
    for name, leaf in found.items():
        assert bool((leaf.grad != 0).any()), name
        assert_close(leaf.grad, oracle[name].grad, plain[name].grad, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_in_float64_gradients_are_exact(bits: int, rounded: bool) -> None:
    case = Case(bits, "weight_only", dtype=torch.float64, rounded=rounded)
    found, oracle = case.leaves(), case.leaves()
    if not rounded:
        found["log_scale"], oracle["log_scale"] = case.trains["log_scale"], case.trains["log_scale"]
    for leaves, run in ((found, case.run), (oracle, case.formula)):
        run(leaves).square().sum().backward()
    for name, leaf in found.items():
        if not leaf.requires_grad:
            continue
        assert leaf.grad.dtype == torch.float64
        assert torch.allclose(leaf.grad, oracle[name].grad, rtol=1e-9, atol=1e-12), name


def test_bfloat16_activations_have_gradients_near_the_formula() -> None:
    case = Case(4, "weight_only", dtype=torch.bfloat16)
    found, oracle, plain = case.leaves(), case.leaves(torch.float64), case.leaves()
    upstream = torch.randn(5, N)
    case.run(found).backward(upstream.bfloat16())
    case.formula(oracle).backward(upstream.bfloat16().double())
    values = case.run(plain)
    values.backward(upstream.bfloat16())
    for name, leaf in found.items():
        limit = 2**-6 * float(oracle[name].grad.abs().max())
        assert float((leaf.grad.double() - oracle[name].grad).abs().max()) <= limit, name


@pytest.mark.parametrize("rounded", [True, False])
def test_nothing_dense_is_kept_for_the_backward_pass(rounded: bool) -> None:
    case = Case(4, "weight_only", rounded=rounded)
    kept: list[int] = []
    leaves = case.leaves()
    known = {t.data_ptr() for t in (*leaves.values(), case.codes, case.scale, case.kept)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        case.run(leaves)
    assert kept
    assert set(kept) <= known


def test_frozen_parts_get_no_gradient() -> None:
    case = Case(4, "static")
    for frozen in ({"log_scale"}, {"a", "b"}, {"x", "input_log_scale"}, {"bias"}):
        leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in case.trains.items()}
        case.run(leaves).sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is None} == frozen


def test_a_residual_never_changes_a_code_by_itself() -> None:
    for bits in (4, 8):
        case = Case(bits, "weight_only")
        zero = torch.zeros(N, K)
        codes = codes_now(case.codes, case.kept, zero, bits=bits, length=K)
        assert torch.equal(codes, unpack(case.codes, bits=bits, length=K))


def test_opcheck() -> None:
    for case in (Case(4, "weight_only", lora=False, symmetric=False), Case(8, "static")):
        leaves = case.leaves()
        inputs = case.input_scale, leaves.get("input_log_scale")
        arguments = (leaves["x"], *case.adapter(leaves), *inputs, leaves["bias"], FACTOR, False, False, case.bits)
        for rounded in (True, False):
            torch.library.opcheck(torch.ops.hfquant.grid_linear.default, (*arguments, rounded))


def test_int8_and_asymmetric_grid_weights_are_refused_where_they_do_not_fit() -> None:
    case = Case(8, "weight_only", symmetric=False)
    delta = torch.zeros(N, K)
    out = grid_weight(case.codes, None, delta, case.current_scale(), case.zero, bits=8, dtype=torch.float32)
    zero = unpack(case.zero, bits=8, length=K // GROUP).repeat_interleave(GROUP, 1).float()
    values = unpack(case.codes, bits=8, length=K).float() - zero
    assert torch.equal(out, values * case.current_scale().repeat_interleave(GROUP, 1))
    with pytest.raises(KernelError, match=r"give packed codes \[6, 8\]"):
        grid_weight(case.codes, None, delta, case.current_scale(), bits=4, dtype=torch.float32)

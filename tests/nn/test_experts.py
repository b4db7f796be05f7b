"""Packed experts against Transformers' own eager experts on the dequantized weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hfquant.nn.packed_module import PackedModule
from hfquant.nn.quant_experts import QuantExperts
from tests.support.packed import pack_
from tests.support.tiny_models import build
from tests.support.tolerance import GRADIENT_FACTOR, SAME_VALUES, assert_close


MODELS = ["mixtral", "qwen3-moe", "gpt-oss"]
SAME_ORDER = ["mixtral", "qwen3-moe"]
"""Their float products add up in the order of ours; gpt-oss keeps its weights transposed."""

ROUTES = {
    "spread": lambda: torch.stack([torch.randperm(4)[:2] for _ in range(7)]),
    "one-expert-unused": lambda: torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0], [3, 1], [0, 1]]),
    "all-to-one": lambda: torch.full((7, 1), 2),
}


def experts_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(name).to(dtype)
    (experts,) = (m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    experts.config._experts_implementation = "eager"
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def tokens(index: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(len(index), 64).to(dtype), index, torch.rand(index.shape).to(dtype)


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel", "int4-g32-asym"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_experts_compute_what_the_restored_ones_do(name: str, scheme: str, route: str) -> None:
    experts = experts_of(name)
    original, inputs = type(experts), tokens(ROUTES[route]())
    before = experts(*inputs)
    packed = pack_(experts, scheme)(*inputs)
    assert isinstance(experts, QuantExperts)
    assert not torch.equal(packed, before)
    experts.restore_()
    assert type(experts) is original
    if name in SAME_ORDER:
        assert torch.equal(experts(*inputs), packed)
    else:
        torch.testing.assert_close(experts(*inputs), packed, **SAME_VALUES)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_experts_compute_what_the_restored_ones_do(name: str) -> None:
    experts, inputs = experts_of(name, torch.bfloat16), tokens(ROUTES["spread"](), torch.bfloat16)
    packed = pack_(experts, "int4-g16")(*inputs)
    assert packed.dtype == torch.bfloat16
    experts.restore_()
    plain = experts(*inputs)
    oracle = experts.double()(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert_close(packed, oracle, plain)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", SAME_ORDER)
def test_inputs_of_both_products_are_quantized(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = experts_of(name), tokens(ROUTES["spread"]())
    step = torch.tensor([4 / 127]).bfloat16().float()
    found = pack_(experts, f"int8-channel-{kind}", input_scale=4 / 127)(*inputs)
    experts.restore_()
    float_linear = nn.functional.linear

    def linear_of_rounded(x: Tensor, weight: Tensor) -> Tensor:
        scale = step if kind == "static" else x.abs().amax(-1, keepdim=True) / 127
        return float_linear((x / scale).round().clamp(-128, 127) * scale, weight)

    unquantized = experts(*inputs).detach()
    monkeypatch.setattr(nn.functional, "linear", linear_of_rounded)
    torch.testing.assert_close(found, experts(*inputs), **SAME_VALUES)
    assert float((found.detach() - unquantized).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_tokens_without_an_expert_get_zero(name: str) -> None:
    experts = pack_(experts_of(name), "int4-g16")
    index = torch.tensor([[0, 4], [4, 4], [3, 1]])
    x, _, weights = tokens(index)
    out = experts(x, index, weights)
    assert not bool(out[1].any())
    assert torch.equal(experts(x[:1], index[:1, :1], weights[:1, :1]), out[:1])
    empty = experts(x[:0], index[:0], weights[:0])
    assert empty.shape == (0, 64)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_tokens_and_routing_weights(name: str) -> None:
    packed = experts_of(name)
    x, index, weights = tokens(ROUTES["spread"]())
    pack_(packed, "int4-g16")
    plain = copy.deepcopy(packed)
    plain.restore_()
    gradients = []
    for module, dtype in (
        (packed, torch.float32),
        (plain, torch.float32),
        (copy.deepcopy(plain).double(), torch.double),
    ):
        inputs = [tensor.to(dtype).clone().requires_grad_() for tensor in (x, weights)]
        module(inputs[0], index, inputs[1]).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for found, ours, oracle in zip(*gradients, strict=True):
        assert_close(found, oracle, ours, factor=GRADIENT_FACTOR)


def test_each_expert_has_its_own_scales() -> None:
    experts = experts_of("mixtral")
    experts.gate_up_proj.data[2] *= 1000
    before = experts.gate_up_proj.detach().clone()
    pack_(experts, "int8-channel").restore_()
    steps = before.abs().amax(-1, keepdim=True) / 127
    assert bool(((experts.gate_up_proj - before).abs() <= steps * 0.8).all())


def test_transposed_experts_are_packed_along_their_inputs() -> None:
    experts = experts_of("gpt-oss")
    expected = {name: p.shape for name, p in experts.named_parameters()}
    pack_(experts, "int4-g16")
    assert {name: w.shape for name, w in experts.float_weights.items()} == {
        "gate_up_proj": (4, 192, 64),
        "down_proj": (4, 64, 96),
    }
    assert experts.gate_up_proj_scale.shape == (4, 192, 4)
    assert experts.gate_up_proj_bias.dtype == torch.float32
    experts.restore_()
    assert {name: p.shape for name, p in experts.named_parameters()} == expected
    assert all(p.is_contiguous() for p in experts.parameters())


def test_copies_and_casts_of_experts() -> None:
    experts, inputs = pack_(experts_of("gpt-oss"), "int4-g16-static"), tokens(ROUTES["spread"]())
    clone: PackedModule = copy.deepcopy(experts)
    assert torch.equal(clone(*inputs), experts(*inputs))
    clone.to(torch.bfloat16)
    assert (clone.down_proj_bias.dtype, clone.down_proj.dtype) == (torch.bfloat16, torch.int32)
    assert torch.equal(clone.down_proj_scale, experts.down_proj_scale)
    assert clone.state_dict().keys() == experts.state_dict().keys()


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel-dynamic", "int8-channel-static"])
def test_experts_that_get_every_token(scheme: str) -> None:
    (experts,) = (m for n, m in build("llama4").named_modules() if n.endswith("layers.1.feed_forward.experts"))
    chosen = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0] * 5, [0, 0, 1, 0, 0]])
    x = (torch.randn(4, 5, 64) * chosen[..., None]).view(20, 64)
    pack_(experts, scheme)
    assert isinstance(experts, QuantExperts)
    found = experts(x)
    assert not bool(found[chosen.view(-1) == 0].any())
    rows = []
    for expert in range(4):  # every token by every expert, as the float model does it
        one = torch.full((5, 1), expert)
        rows.append(experts(x.view(4, 5, 64)[expert], one, torch.ones(5, 1)))
    torch.testing.assert_close(found, torch.cat(rows), **SAME_VALUES)
    if scheme == "int4-g16":
        experts.restore_()
        torch.testing.assert_close(found, experts(x), **SAME_VALUES)


class Ungated(nn.Module):
    """Experts without a gate and with a norm after each, marked as Transformers marks them."""

    def __init__(self) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.num_experts = False, False, False, 3
        self.has_post_expert_norm, self.act_fn, self.post_expert_norm = True, nn.ReLU(), nn.LayerNorm(16)
        self.up_proj = nn.Parameter(torch.randn(3, 24, 16))
        self.down_proj = nn.Parameter(torch.randn(3, 16, 24))


def test_experts_without_a_gate_and_with_a_norm() -> None:
    module = pack_(Ungated(), "int8-channel")
    x, index, weights = torch.randn(5, 16), torch.tensor([[0], [1], [2], [0], [1]]), torch.rand(5, 1)
    found = module(x, index, weights)
    module.restore_()
    up = torch.einsum("mk,mnk->mn", x, module.up_proj[index[:, 0]]).relu()
    down = torch.einsum("mn,mkn->mk", up, module.down_proj[index[:, 0]])
    torch.testing.assert_close(found, module.post_expert_norm(down) * weights, **SAME_VALUES)

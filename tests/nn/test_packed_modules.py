import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from hfquant.nn.packed_module import PackedModule, packed_bytes
from hfquant.nn.quant_linear import QuantLinear
from hfquant.nn.select import packed_class
from hfquant.nn.swap import restore_modules_, swap_modules_, tie_packed_
from hfquant.ptq.quantize_weight import quantize_weight
from hfquant.schemes import LayerScheme
from tests.support.tiny_models import build
from tests.support.tolerance import SAME_VALUES


def pack_(module: nn.Module, scheme: str) -> PackedModule:
    """Quantize one module in place, round to nearest."""
    parsed = LayerScheme.parse(scheme)
    target = packed_class(module)
    packed = {
        key: quantize_weight(w.to_rows(module.get_parameter(key)), parsed.weight, algorithm="rtn", name=key).packed
        for key, w in target.weights_of(module).items()
    }
    target.swap_(module, parsed)
    for key, value in packed.items():
        module.load_packed(value, key)
    return module


def scaled_embedding(kind: type) -> nn.Module:
    return kind(20, 32, 0, embed_scale=5.7)


MODULES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(32, 6), lambda: torch.randn(2, 3, 32)),
    "linear-no-bias": (lambda: nn.Linear(32, 6, bias=False), lambda: torch.randn(3, 32)),
    "conv1d": (lambda: Conv1D(6, 32), lambda: torch.randn(2, 3, 32)),
    "embedding": (lambda: nn.Embedding(20, 32, padding_idx=0), lambda: torch.tensor([[1, 19], [0, 3]])),
    "gemma3-embedding": (lambda: scaled_embedding(Gemma3TextScaledWordEmbedding), lambda: torch.tensor([1, 19])),
    "bart-embedding": (lambda: scaled_embedding(BartScaledWordEmbedding), lambda: torch.tensor([1, 19])),
}


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel", "int4-channel-asym"])
@pytest.mark.parametrize("name", MODULES)
def test_packed_module_computes_what_the_restored_one_does(name: str, scheme: str) -> None:
    make, inputs = MODULES[name]
    module, x = make(), inputs()
    original, attributes = type(module), set(vars(module))
    before = module(x)
    pack_(module, scheme)
    packed = module(x)
    assert module.weight.dtype == torch.int32
    assert module.weight_scale.dtype == torch.int16
    assert not torch.equal(packed, before)
    module.restore_()
    assert type(module) is original
    assert set(vars(module)) == attributes
    if name == "conv1d":  # its float product adds up in another order
        torch.testing.assert_close(module(x), packed, **SAME_VALUES)
    else:
        assert torch.equal(module(x), packed)
    assert list(module.state_dict()) == list(make().state_dict())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_packed_experts_compute_what_the_restored_ones_do(name: str) -> None:
    model = build(name)
    (experts,) = (m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    experts.config._experts_implementation = "eager"
    original = type(experts)
    x, index = torch.randn(7, 64), torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    before = experts(x, index, torch.rand(7, 2))
    weights = torch.rand(7, 2)
    pack_(experts, "int4-g32")
    packed = experts(x, index, weights)
    assert packed.shape == before.shape
    experts.restore_()
    assert type(experts) is original
    torch.testing.assert_close(experts(x, index, weights), packed, **SAME_VALUES)


def test_hooks_references_and_copies_survive() -> None:
    linear, calls = nn.Linear(32, 6), []
    linear.register_forward_hook(lambda *_: calls.append(1))
    holder = nn.Sequential(linear)
    pack_(linear, "int8-channel")
    assert holder[0] is linear
    x = torch.randn(2, 32)
    clone = copy.deepcopy(holder)
    assert torch.equal(clone(x), holder(x))
    assert len(calls) == 2
    clone[0].restore_()
    assert isinstance(linear, QuantLinear)


def test_state_dict_round_trip() -> None:
    first, second = pack_(nn.Linear(32, 6), "int4-g16"), pack_(nn.Linear(32, 6), "int4-g16")
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 32)
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == ["weight", "weight_scale", "bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_touch_neither_codes_nor_scales(dtype: torch.dtype) -> None:
    model = nn.Sequential(pack_(nn.Embedding(20, 32), "int4-g16"), pack_(nn.Linear(32, 6), "int4-g16"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype))
        assert tensor.dtype == (dtype if name.endswith("bias") else before[name].dtype)
    assert model(torch.tensor([1, 2])).dtype == dtype
    model.float()
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])
    assert model(torch.tensor([1, 2])).dtype == torch.float32


def test_integers_never_train() -> None:
    module = pack_(nn.Linear(32, 6), "int8-channel")
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]
    x = torch.randn(2, 32, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.bias.grad is not None


def test_ties_are_shared_and_come_back_shared() -> None:
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 20, bias=False))
    model[1].weight = model[0].weight
    pack_(model[0], "int8-channel")
    swap_modules_(model, {"1": LayerScheme.parse("int8-channel")}, {"1": "0"})
    assert model[1].weight is model[0].weight
    assert model[1].weight_scale is model[0].weight_scale
    tie_packed_(model, {"1": "0"})
    restore_modules_(model)
    assert model[1].weight is model[0].weight
    assert type(model[1]) is nn.Linear


def test_packed_bytes_counts_codes_scales_and_zero_points() -> None:
    (weight,) = QuantLinear.weights_of(nn.Linear(64, 10)).values()
    assert packed_bytes(weight, LayerScheme.parse("int4-g32")) == 10 * (64 // 2 + 2 * 2)
    assert packed_bytes(weight, LayerScheme.parse("int4-g32-asym")) == 10 * (64 // 2 + 2 * 2 + 4)
    assert packed_bytes(weight, LayerScheme.parse("int8-channel-static")) == 10 * (64 + 2) + 2


def test_description_names_scheme_and_sizes() -> None:
    text = repr(pack_(nn.Linear(32, 6), "int4-g16"))
    assert text == "QuantLinear(in_features=32, out_features=6, bias=True, scheme=int4-g16)"

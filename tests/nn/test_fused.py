"""Norms, gated activations and rotary embeddings of quantized models run as one op each, and nothing else changes."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hfquant import dequantize_model, prepare_model_qat, quantize_model_ptq
from hfquant.hf.qat import converted_model
from hfquant.kernels import native
from hfquant.nn.fused import SETTINGS, Fused, FusedActivation, fuse_modules_, unfuse_modules_
from tests.support.tiny_models import TINY, build


pytestmark = pytest.mark.skipif(not native.is_active(), reason="the native kernels are not built")

IDS = torch.arange(3, 19).unsqueeze(0)


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


def quantized(name: str = "llama", **options: object) -> nn.Module:
    defaults = {"quantization_bits": 8, "quantization_type": "weight_only", "progress": False}
    return quantize_model_ptq(build(name), **defaults | options).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-moe", "deepseek-v3"])
def test_fused_models_compute_the_same(name: str, dtype: torch.dtype) -> None:
    model = quantized(name).to(dtype)
    assert fused(model)
    found = logits(model)
    unfuse_modules_(model)
    assert not fused(model)
    plain = logits(model).float()
    error = (found.float() - plain).abs().max() / plain.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    assert dtype == torch.bfloat16 or error > 0  # it would not have been fused at all


def test_what_is_fused_in_a_llama() -> None:
    model = quantized()
    assert fused(model) == [
        *(
            f"model.layers.{i}.{part}"
            for i in (0, 1)
            for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        ),
        "model.norm",
    ]
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    assert isinstance(norm, LlamaRMSNorm)
    assert isinstance(mlp, LlamaMLP)
    assert type(norm).__name__ == "LlamaRMSNorm"
    assert repr(norm) == repr(LlamaRMSNorm(64, eps=norm.variance_epsilon))
    assert list(model.state_dict()) == list(quantized().state_dict())


def test_logits_do_not_depend_on_gradients() -> None:
    for name, kind in product(("llama", "gemma3", "bert-mlm"), ("weight_only", "dynamic")):
        model = quantized(name, quantization_type=kind)
        assert torch.equal(model(input_ids=IDS).logits, logits(model))


def test_gradients_are_those_of_the_model_without_fusion() -> None:
    model = quantized()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    found = gradients()
    unfuse_modules_(model)
    assert len(found) == 5
    for ours, plain in zip(found, gradients(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_the_reference_runs_what_transformers_runs() -> None:
    model = quantized()
    with native.selected("reference"):
        found = logits(model)
        unfuse_modules_(model)
        assert torch.equal(found, logits(model))


def test_it_is_undone_with_the_quantization() -> None:
    model = dequantize_model(quantized())
    plain = build("llama")
    for (name, module), other in zip(model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(other), name
        assert SETTINGS not in vars(module), name


@pytest.mark.parametrize("kind", ["weight_only", "dynamic"])
def test_what_trains_computes_what_is_shipped(kind: str) -> None:
    model = prepare_model_qat(build("llama"), quantization_bits=8, quantization_type=kind, progress=False)
    names = fused(model)
    assert len(names) == 9
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "norm" in name)
    model.eval()
    with native.selected("reference"):
        trained = logits(model)
        with converted_model(model):
            assert fused(model) == names
            assert torch.equal(logits(model), trained)
    assert fused(model) == names


def test_copies_and_pickles() -> None:
    model = quantized()
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert fused(other) == fused(model)
        assert torch.equal(logits(other), expected)


def test_hooks_and_compiled_models() -> None:
    model = quantized()
    expected, seen = logits(model), []
    for module in (model.model.norm, model.model.layers[0].mlp.gate_proj, model.model.layers[1].mlp):
        module.register_forward_hook(lambda module, inputs, output: seen.append(module))
    assert torch.equal(logits(model), expected)
    assert len(seen) == 3
    compiled = torch.compile(quantized(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).dtype == torch.bfloat16


class Wrong(nn.Module):
    """A norm that is almost one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(32)), 1e-6, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "centred":
            x = x - x.mean(-1, keepdim=True)
        if self.kind == "eps outside":
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)
        if self.kind == "dropout":
            x = nn.functional.dropout(x, 0.5, self.training)
        values = x.float()
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * values).to(x.dtype)


class Gated(LlamaMLP):
    """A gated layer that is almost one."""

    kind = "order"

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "order":
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(inner, 0.1, self.training))


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_compute_something_else_stay_alone(training: bool) -> None:
    dropping, other = Gated(t.LlamaConfig(hidden_size=32)), LlamaMLP(t.LlamaConfig(hidden_size=32, hidden_act="relu"))
    dropping.kind = "dropout"
    wrong = [Wrong(kind) for kind in ("centred", "eps outside", "dropout")]
    plain = [nn.LayerNorm(32, bias=False), nn.LayerNorm(32), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32)]
    model = nn.ModuleList([*wrong, *plain, Gated(t.LlamaConfig(hidden_size=32)), dropping, other]).train(training)
    state = torch.random.get_rng_state()
    fuse_modules_(model)
    assert not fused(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training == training for module in model.modules())


def test_modules_that_compute_it_take_part_whatever_their_name() -> None:
    norms = [Wrong("none"), nn.RMSNorm(32, eps=1e-6), T5LayerNorm(32), Gemma3RMSNorm(32)]
    gates = [LlamaMLP(t.LlamaConfig(hidden_size=32, hidden_act=act)) for act in ("silu", "gelu_pytorch_tanh")]
    model = nn.ModuleList([*norms, *gates])
    x = torch.randn(3, 32)
    plain = [module(x) for module in model]
    fuse_modules_(model)
    assert len(fused(model)) == len(model)
    for module, expected in zip(model, plain, strict=True):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "settings"), [("bert-mlm", (2, "dense")), ("vit", (2, "fc1", "fc2"))])
def test_activations_behind_a_layer(name: str, settings: tuple[object, ...]) -> None:
    model = quantized(name)
    found = [module for module in model.modules() if isinstance(module, FusedActivation)]
    assert [vars(module)[SETTINGS] for module in found] == [settings] * 2
    inputs = TINY[name].inputs()
    with torch.no_grad():
        ours = model(**inputs)[0]
        for module in found:
            module.__class__ = module.float_class
        plain = model(**inputs)[0]
    assert 0 < (ours - plain).abs().max() < 0.05 * plain.abs().max()


def test_rotary_embeddings_have_the_same_bits() -> None:
    quantized()
    original = modeling_llama.apply_rotary_pos_emb.__wrapped__
    q, k, (cos, sin) = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(2, 1, 6, 16)
    for arguments in ((q, k, cos, sin), (q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)):
        for found, plain in zip(modeling_llama.apply_rotary_pos_emb(*arguments), original(*arguments), strict=True):
            assert torch.equal(found, plain)
    q.requires_grad_()
    assert modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)[0].requires_grad


def test_every_tiny_model_computes_the_same() -> None:
    for name, tiny in TINY.items():
        model, inputs = quantized(name, quantization_bits=4), tiny.inputs()
        with torch.no_grad():
            found = model(**inputs)[0]
            unfuse_modules_(model)
            plain = model(**inputs)[0]
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()), msg=name)

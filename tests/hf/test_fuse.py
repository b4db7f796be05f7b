"""Attention of quantized models: what runs on kernels of ours, with the same results, and what stays as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfquant import dequantize_model, prepare_model_qat, quantize_model_ptq
from hfquant.hf.fuse import FusedAttention, fuse_model_
from hfquant.kernels import native
from hfquant.nn.fused import ATTENDS, SETTINGS, fuse_modules_, unfuse_modules_
from tests.support.tiny_models import build


pytestmark = pytest.mark.skipif(not native.is_active(), reason="the native kernels are not built")

IDS = torch.arange(3, 19).unsqueeze(0)
PADDED = {
    "input_ids": IDS.expand(2, -1),
    "attention_mask": (torch.arange(16) >= torch.tensor([[0], [4]])).long(),
}


class Seen(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def count(self, op: str) -> int:
        return sum(name == f"hfquant::{op}" for name in self.names)


def quantized(name: str = "llama", **options: Any) -> Any:
    defaults = {"quantization_bits": 8, "quantization_type": "dynamic", "progress": False}
    return quantize_model_ptq(build(name), **defaults | options).eval()


@contextmanager
def layers_one_by_one(model: nn.Module) -> Iterator[None]:
    """Attention modules have their own forward, which looks the attention function up."""
    changed = [(module, type(module)) for module in model.modules() if isinstance(module, FusedAttention)]
    for module, kind in changed:
        module.__class__ = kind.float_class
    yield
    for module, kind in changed:
        module.__class__ = kind


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedAttention)]


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["weight_only", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "llama-odd", "mixtral", "olmo"])
def test_one_op_has_the_bits_of_layers_one_by_one(name: str, kind: str, bits: int) -> None:
    model = quantized(name, quantization_bits=bits, quantization_type=kind)
    assert len(attention_modules(model)) == 2
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS[:, :1]}, PADDED):
        with Seen() as seen:
            found = logits(model, **inputs)
        assert seen.count("rotated_heads_cpu") == seen.count("attention_cpu") == 2
        with layers_one_by_one(model), Seen() as seen:
            assert torch.equal(logits(model, **inputs), found)
        assert seen.count("rotated_heads_cpu") == 0
        assert seen.count("attention_cpu") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    model = quantized().to(dtype)
    found = logits(model, **PADDED)
    with layers_one_by_one(model):
        assert torch.equal(logits(model, **PADDED), found)


@pytest.mark.parametrize("static", [False, True])
def test_generation_with_a_cache(static: bool) -> None:
    model = quantized(quantization_type="weight_only")

    def steps() -> list[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=40) if static else t.DynamicCache(config=model.config)
        pieces = IDS[:, :9].split([5, 1, 2, 1], 1)
        return [logits(model, input_ids=piece, past_key_values=cache, use_cache=True)[:, -1] for piece in pieces]

    found = steps()
    with layers_one_by_one(model):
        assert all(map(torch.equal, steps(), found))
    for step, end in zip(found, (5, 6, 8, 9), strict=True):
        torch.testing.assert_close(step, logits(model, input_ids=IDS[:, :end])[:, -1], rtol=1e-4, atol=1e-5)
    generated = model.generate(**PADDED, max_new_tokens=5, do_sample=False, pad_token_id=0)
    unfuse_modules_(model)
    assert torch.equal(generated, model.generate(**PADDED, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_models_with_other_attention_run_the_kernel_too() -> None:
    for name in ("qwen3", "gemma3", "bert", "vit", "gpt2", "whisper"):
        model = quantized(name)
        assert not attention_modules(model)
        assert any(ATTENDS in vars(module) for module in model.modules()), name
    model = quantized("bert-mlm")
    with Seen() as seen:
        logits(model, **PADDED)
    assert seen.count("attention_cpu") == 2


def test_attention_weights_hooks_and_other_functions() -> None:
    model, calls = quantized(), []
    expected = logits(model, input_ids=IDS)
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append("hook"))
    assert torch.equal(logits(model, input_ids=IDS), expected)
    assert calls == ["hook"]

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append("mine")
        return sdpa_attention_forward(*args, **kwargs)

    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", mine)
    try:
        torch.testing.assert_close(logits(model, input_ids=IDS), expected, rtol=1e-2, atol=1e-2)
        assert calls.count("mine") == 2
        fuse_model_(quantized())
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        AttentionInterface.register("sdpa", wrapped)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=IDS, output_attentions=True).attentions
    assert len(attentions) == 2
    assert attentions[0].shape == (1, 4, 16, 16)


def test_float_models_of_the_process_run_what_they_ran() -> None:
    quantized()
    model = build("llama")
    with Seen() as seen:
        logits(model, input_ids=IDS)
    assert seen.count("attention_cpu") == 0


def test_training_runs_layers_one_by_one() -> None:
    for model in (quantized(), prepare_model_qat(build("llama"), quantization_bits=8, progress=False)):
        with Seen() as seen:
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert seen.count("rotated_heads_cpu") == 0


def test_it_is_undone_with_the_quantization() -> None:
    model = dequantize_model(quantized())
    for module in model.modules():
        assert ATTENDS not in vars(module)
        assert SETTINGS not in vars(module)
        assert not isinstance(module, FusedAttention)


class Almost(t.models.llama.modeling_llama.LlamaAttention):
    """Llama's attention but for one thing."""

    kind = ""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if self.kind == "positions":
            hidden_states = hidden_states * (1 + kwargs["position_ids"][..., None] / 1000)
        if self.kind == "no rotation":
            position_embeddings = torch.ones_like(position_embeddings[0]), torch.zeros_like(position_embeddings[1])
        mask = None if self.kind == "no mask" else attention_mask
        cache = None if self.kind == "no cache" else past_key_values
        out, weights = super().forward(hidden_states, position_embeddings, mask, cache, **kwargs)
        return (out * 2 if self.kind == "factor" else out), weights


class Reordered(Almost):
    """The same with arguments in another order, which callers may rely on."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Any:
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


@pytest.mark.parametrize(
    "kind", ["", "positions", "no rotation", "no mask", "no cache", "factor", "order", "scale", "norm"]
)
def test_only_attention_as_in_llama_gets_one_op(kind: str) -> None:
    plain = build("llama")
    attention = plain.model.layers[1].self_attn
    attention.__class__, attention.kind = Reordered if kind == "order" else Almost, kind
    if kind == "norm":
        attention.q_norm = nn.LayerNorm(8)
        attention.q_proj.register_forward_hook(lambda *_: None)
    if kind == "scale":
        attention.scaling = 0.3  # another number is no other formula
    model = quantize_model_ptq(plain, quantization_bits=8, progress=False).eval()
    same = kind in ("", "scale", "norm")  # a module that is never called changes nothing
    assert [name for name, m in model.named_modules() if isinstance(m, FusedAttention)] == [
        f"model.layers.{i}.self_attn" for i in ((0, 1) if same else (0,))
    ]
    found = logits(model, input_ids=IDS)
    with layers_one_by_one(model):
        assert torch.equal(logits(model, input_ids=IDS), found)


def test_attention_may_become_bidirectional() -> None:
    model = quantized(quantization_type="weight_only")
    causal = logits(model, input_ids=IDS)
    with layers_one_by_one(model):
        expected = logits(model, input_ids=IDS, is_causal=False)
    assert torch.equal(logits(model, input_ids=IDS, is_causal=False), expected)
    for module in attention_modules(model):
        module.is_causal = False
    found = logits(model, input_ids=IDS)
    assert not torch.equal(found, causal)
    with layers_one_by_one(model):
        assert torch.equal(logits(model, input_ids=IDS), found)


def test_probing_leaves_no_trace() -> None:
    model = quantized()
    unfuse_modules_(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state, implementation = torch.random.get_rng_state(), model.config._attn_implementation
    fuse_model_(model)
    unfuse_modules_(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.config._attn_implementation == implementation
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    fuse_modules_(model)
    assert not attention_modules(model)


def test_compiled_models_run_the_same_ops() -> None:
    model = quantized(quantization_type="weight_only")
    ops: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for inputs in ({"input_ids": IDS}, PADDED):
        with torch.no_grad():
            found = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(found, logits(model, **inputs), rtol=1e-3, atol=1e-3)
    for op, count in product(("rotated_heads_cpu", "attention_cpu", "gated_mlp_cpu"), (4,)):
        assert sum(op in name for name in ops) == count


@pytest.mark.slow
def test_compiled_models_may_call_ops_from_cpp() -> None:
    model = quantized(quantization_type="weight_only")
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "cpp_wrapper": True}
    options |= {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}  # all of docs/kernels.md
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, options=options)
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS.flip(1)}):
        with torch.no_grad():
            found = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(found, logits(model, **inputs), rtol=1e-3, atol=1e-3)


def test_an_exported_program_has_no_native_ops() -> None:
    model = quantized()
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    assert not [node for node in program.graph.nodes if "_cpu" in str(node.target)]

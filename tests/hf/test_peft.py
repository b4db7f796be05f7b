"""PEFT's contract on packed layers: what works on a float model works here, and merging rounds onto the grid."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)

from hfquant import (
    ConfigError,
    SchemeError,
    dequantize_model,
    get_quantization_info,
    merge_adapters,
    prepare_model_for_finetuning,
    quantize_model_ptq,
)
from hfquant.finetune.side import MergeReport
from hfquant.hf.peft import add_side_adapter, mean_loss
from hfquant.hf.peft_layers import PackedLoraEmbedding, PackedLoraLinear
from hfquant.numerics.affine import quantize, scale_from_bits
from hfquant.numerics.packing import unpack
from tests.support.adapters import SCHEMES, adapter_state, codes, lora, quantized, randomize_, same
from tests.support.processes import run_python
from tests.support.tiny_models import build, output, text_inputs
from tests.support.tolerance import GRADIENT_FACTOR, SAME_ADAPTER, SAME_VALUES, assert_close


pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_an_adapter_computes_what_it_does_on_the_dequantized_model(name: str, use_dora: bool) -> None:
    fields = {"use_dora": use_dora, "use_rslora": True, "autocast_adapter_dtype": False}
    base = output(quantized(name), name)
    packed = output(lora(quantized(name), **fields), name)
    fields["fan_in_fan_out"] = name == "gpt2"
    plain, exact = (
        output(lora(dequantize_model(quantized(name), dtype), **fields), name)
        for dtype in (torch.float32, torch.float64)
    )
    assert (packed - base).norm() > 0.01 * base.norm()
    assert_close(packed, exact, plain)


@pytest.mark.parametrize("kernels", ["reference_kernels", "native"])
@pytest.mark.parametrize("scheme", ["int4", "int4-asymmetric", "int8"])
def test_gradients_are_those_of_the_dequantized_model(
    scheme: str, kernels: str, request: pytest.FixtureRequest
) -> None:
    if kernels != "native":
        request.getfixturevalue(kernels)
    packed = gradients(lora(quantized(scheme=scheme)))
    plain = gradients(lora(dequantize_model(quantized(scheme=scheme))))
    exact = gradients(lora(dequantize_model(quantized(scheme=scheme), torch.float64), autocast_adapter_dtype=False))
    assert len(packed) == 28
    assert packed.keys() == exact.keys()
    for name, gradient in packed.items():
        assert_close(gradient, exact[name], plain[name], factor=GRADIENT_FACTOR)


def gradients(model: Any) -> dict[str, Tensor]:
    ids = text_inputs()["input_ids"]
    model.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_with_quantized_activations_has_straight_through_gradients(scheme: str) -> None:
    """d/dx of ``op(x) + B A x`` is ``g @ W + g @ B A``: the rounding of activations passes gradients on."""
    model = quantized(scheme=scheme)
    layer = lora(model).base_model.model.model.layers[0].mlp.up_proj
    base, x, upstream = layer.get_base_layer(), torch.randn(5, 64), torch.randn(5, 96)
    inner = x.clone().requires_grad_()
    out = layer(inner)
    out.backward(upstream)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(out, base(x) + 2 * x @ a.t() @ b.t(), **SAME_VALUES)
    exact, plain = (
        upstream.to(dtype) @ (base.dequantize(dtype=torch.float32).to(dtype) + 2 * (b.to(dtype) @ a.to(dtype)))
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(inner.grad, exact, plain, factor=GRADIENT_FACTOR)


def test_no_dense_weight_is_kept_for_the_backward_pass() -> None:
    model, kept = lora(quantized()), []
    shapes = {m.float_weights["weight"].shape for m in model.modules() if hasattr(m, "float_weights")}
    ids = text_inputs()["input_ids"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert any(dtype == torch.int32 for dtype, _ in kept)
    dense = [shape for dtype, shape in kept if dtype.is_floating_point and shape in shapes | {s[::-1] for s in shapes}]
    assert dense == []


# Merging.


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_merging_rounds_onto_the_grid_and_unmerging_is_exact(scheme: str, use_dora: bool, tmp_path: Path) -> None:
    base = quantized(scheme=scheme)
    size, original, before = get_quantization_info(base).bytes_after, codes(base), output(base, "llama")
    model = lora(base, use_dora=use_dora)
    beside = output(model, "llama")
    model.merge_adapter()
    merged = output(model, "llama")
    assert (merged - beside).norm() < (before - beside).norm()
    model.unmerge_adapter()
    assert same(codes(model), original)
    assert torch.equal(output(model, "llama"), beside)
    shipped = model.merge_and_unload()
    assert isinstance(shipped, PreTrainedModel)
    assert torch.equal(output(shipped, "llama"), merged)
    report: MergeReport = shipped.merge_report
    assert report.layers == 14
    changed = [key for key, value in codes(shipped).items() if not torch.equal(value, original[key])]
    assert len(changed) == 14  # codes only: no scale, zero point or range
    assert all(key.endswith("proj.weight") for key in changed)
    assert 0 < report.changed_share < 1
    assert 0.5 < report.survived < 1.1
    shipped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, "llama"), merged)
    assert same(codes(loaded), codes(shipped))
    assert get_quantization_info(shipped).bytes_after == size
    moved = get_quantization_info(loaded).finetuning
    assert (moved.adapter, moved.codes_moved, moved.scales_moved) == ("side", report.codes_changed, 0)
    assert 0 < moved.codes_moved < moved.codes == report.weights


def test_merged_codes_are_those_of_the_dense_sum() -> None:
    model = lora(quantized())
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    base = layer.get_base_layer()
    before = base.dequantize(dtype=torch.float32)
    wanted = before + layer.get_delta_weight("default").detach()
    expected = quantize(wanted.view(64, -1, 64), scale_from_bits(base.weight_scale).unsqueeze(-1), bits=4)
    model.merge_adapter()
    assert torch.equal(unpack(base.weight, bits=4, length=64), expected.view(64, 64))
    assert (base.dequantize() - wanted).norm() < (before - wanted).norm()


@pytest.mark.parametrize("scheme", ["int4", "int4-asymmetric", "int8"])
def test_kept_residuals_let_small_updates_survive(scheme: str) -> None:
    """An update far below a step changes no code by itself; counted in with what rounding took, some codes flip."""
    reports, residuals = {}, []
    for keep in (False, True):
        model = quantized(scheme=scheme, keep_residual=keep)
        original = codes(model)
        adapted = randomize_(lora(model), std=0.03 if "int4" in scheme else 0.005)
        adapted.merge_adapter()
        moved = codes(adapted)
        adapted.unmerge_adapter()
        assert same(codes(adapted), original)
        reports[keep] = adapted.merge_and_unload().merge_report
        residuals = [key for key in moved if key.endswith("_residual") and not torch.equal(moved[key], original[key])]
    assert reports[False].codes_changed < reports[True].codes_changed
    assert reports[False].survived < 0.2
    assert 0.7 < reports[True].survived < 1.3
    assert len(residuals) == 14


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_adapters_merged_one_after_another_are_rounded_once() -> None:
    together, apart = two_adapters(), two_adapters()
    together.merge_adapter(adapter_names=["default", "second"])
    apart.merge_adapter(adapter_names=["default"])
    apart.merge_adapter(adapter_names=["second"])
    assert same(codes(together), codes(apart))
    apart.unmerge_adapter()
    assert same(codes(apart), codes(quantized()))


def two_adapters() -> Any:
    model = lora(quantized())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True))
    return randomize_(model, seed=2, adapter="second")


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_several_adapters_are_switched_disabled_and_deleted() -> None:
    base = output(quantized(), "llama")
    model = two_adapters()
    first = output(model, "llama")
    model.set_adapter("second")
    second = output(model, "llama")
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(output(model, "llama"), base)
    model.set_adapter("default")
    assert torch.equal(output(model, "llama"), first)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    torch.testing.assert_close(output(model, "llama"), first, **SAME_ADAPTER)
    model.delete_adapter("copy")
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(output(model, "llama"), first)
    assert torch.equal(output(model.unload(), "llama"), base)


def test_disabling_merged_adapters_gives_the_base_model_back() -> None:
    base = output(quantized(), "llama")
    model = lora(quantized())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, "llama"), base)


def test_a_bias_is_merged_and_restored() -> None:
    model = lora(quantized("bert"), lora_bias=True, target_modules=["query", "value"])
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    before, beside = layer.base_layer.bias.detach().clone(), output(model, "bert")
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.bias, before + 2 * layer.lora_B["default"].bias)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, before)
    assert torch.equal(output(model, "bert"), beside)


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning")
def test_what_cannot_be_merged_is_refused() -> None:
    model = lora(quantized(), lora_bias=True)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj has no bias"):
        model.merge_adapter()
    broken = lora(quantized())
    with torch.no_grad():
        broken.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight[0] = float("inf")
    before = output(broken, "llama")
    with pytest.raises(SchemeError, match=r"layers\.0\.mlp\.up_proj: the adapter makes NaN"):
        broken.merge_and_unload()
    assert before.isnan().any() or before.isinf().any()


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_a_tied_head_trains_and_is_not_merged() -> None:
    model = lora(quantized("llama-tied", embedding_bits=8), target_modules=["q_proj", "lm_head"])
    assert isinstance(model.base_model.model.lm_head, PackedLoraLinear)
    with pytest.raises(ConfigError, match="share one packed weight"):
        model.merge_adapter()
    model.unload()


def test_an_adapter_on_a_packed_embedding(tmp_path: Path) -> None:
    base = quantized(embedding_bits=4)
    before = output(base, "llama")
    model = lora(base, target_modules=["embed_tokens", "v_proj"])
    assert isinstance(model.base_model.model.model.embed_tokens, PackedLoraEmbedding)
    beside, original = output(model, "llama"), codes(model)
    assert all(gradient.norm() > 0 for gradient in gradients(model).values())
    merged = model.merge_and_unload()
    assert (output(merged, "llama") - beside).norm() < (before - beside).norm()
    assert not torch.equal(codes(merged)["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), output(merged, "llama"))


def test_the_report_has_the_loss_where_data_is_given() -> None:
    ids = text_inputs()["input_ids"]
    model = add_side_adapter(quantized(), rank=4, alpha=8)
    randomize_(model)
    before = mean_loss(model, [{"input_ids": ids, "labels": ids}])
    merged = merge_adapters(model, data=[{"input_ids": ids, "labels": ids}])
    assert merged.merge_report.loss_before == before
    assert merged.merge_report.loss_after == mean_loss(merged, [{"input_ids": ids, "labels": ids}])
    assert "loss" in str(merged.merge_report)
    with pytest.raises(ConfigError, match="give batches with labels"):
        mean_loss(merged, [{"input_ids": ids}])


# Saving and loading.


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lora(base, task_type="CAUSAL_LM", use_dora=True)
    expected = output(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) < 50_000
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(output(loaded, "llama"), expected)
    assert same(adapter_state(loaded), adapter_state(model))
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(output(found, "llama"), expected)
    assert sum(p.requires_grad for p in found.parameters()) == 42
    merged = found.merge_and_unload()
    assert isinstance(merged.merge_report, MergeReport)


def test_the_integration_of_transformers(tmp_path: Path) -> None:
    base = output(quantized(), "llama")
    model = quantized()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    randomize_(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLoraLinear)
    expected = output(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    model.disable_adapters()
    assert torch.equal(output(model, "llama"), base)
    fresh = quantized()
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(fresh, "llama"), expected)


def test_an_adapter_of_a_float_gpt2_fits_the_packed_one(tmp_path: Path) -> None:
    """``Conv1D`` keeps ``[K, N]`` and wants ``fan_in_fan_out``; packed layers do not care."""
    plain = lora(build("gpt2"), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    plain.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantized("gpt2", "int8"), tmp_path)
    assert same(adapter_state(model), adapter_state(plain))
    beside = output(model, "gpt2")
    expected = output(plain, "gpt2")
    assert (beside - expected).norm() < 0.05 * expected.norm()
    merged = model.merge_and_unload()
    assert (output(merged, "gpt2") - beside).norm() < 0.05 * beside.norm()


ORDERS = {
    "peft first": "from peft import *\nimport hfquant\n",
    "no hfquant": "from peft import *\n",
}
PROGRAM = """
import sys, torch
from safetensors.torch import load_file
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(3, 19).unsqueeze(0)
out = model(input_ids=ids).logits
assert torch.equal(out, load_file(sys.argv[1] + "/expected.st")["output"])
base = model.unload()
base = prepare_model_for_kbit_training(base)
assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
model.merge_and_unload()
print("done")
"""


def test_the_order_of_imports_does_not_matter(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path / "base")
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        save_file({"output": model(**text_inputs()).logits}, tmp_path / "adapter" / "expected.st")
    for order, imports in ORDERS.items():
        done = run_python(imports + PROGRAM, str(tmp_path / "adapter"), OMP_NUM_THREADS="1")
        assert done.stdout.splitlines()[-1:] == ["done"], f"{order}: {done.stderr[-2000:]}"


def test_a_module_without_transformers_takes_adapters() -> None:
    torch.manual_seed(0)
    model = quantize_model_ptq(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), progress=False)
    adapted = lora(model, target_modules=["0", "2"])
    x = torch.randn(3, 64)
    beside = adapted(x)
    merged = adapted.merge_and_unload()
    assert merged.merge_report.layers == 2
    assert (merged(x) - beside).norm() < 0.2 * beside.norm()


def test_get_peft_model_names_what_trains() -> None:
    bare = get_quantization_info(quantized())
    model = get_peft_model(quantized(), LoraConfig(r=4, target_modules=["q_proj"]))
    info = get_quantization_info(model)
    assert [q.shape for q in info.quantized] == [q.shape for q in bare.quantized]
    assert sum("lora_" in kept.name for kept in info.kept) == 4
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == 4
    assert all("lora_" in name for name in trains)
    assert "lora_A" in str(model)


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        (BertForSequenceClassification, "SEQ_CLS", "classifier"),
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_heads_of_tasks_train_in_full(kind: Any, task: str, head: str) -> None:
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )
    for adapt in (
        lambda model: prepare_model_for_finetuning(model, "side", rank=4),
        lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["query"], task_type=task)),
    ):
        model = adapt(quantize_model_ptq(kind(config), quantization_bits=4, progress=False))
        whole = {name: p for name, p in model.named_parameters() if head in name and p.requires_grad}
        assert {name.rpartition(".")[2] for name in whole} == {"weight", "bias"}
        model(input_ids=torch.arange(3, 19).unsqueeze(0))[0].sum().backward()
        assert all(p.is_floating_point() and p.grad is not None for p in whole.values())

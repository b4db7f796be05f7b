"""Every architecture: the three ways to a quantized model agree, and saving and loading change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedModel,
    T5Config,
)

from hfquant import HfQuantConfig, get_quantization_info, quantize_model_ptq
from hfquant.hf.roles import model_roles
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.swap import packed_modules
from tests.support.tiny_models import TINY, build, generated, output, text_inputs


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"quantization_bits": 4},
    "int8-dynamic": {"quantization_bits": 8},
    "int4-asymmetric-embedding4": {"quantization_bits": 4, "symmetric": False, "embedding_bits": 4},
}

EXPECTED_ENDS = ("reads this weight itself", "is a subclass of Linear whose owner may read its weight")
EXPECTED_REASONS = (
    "bias",
    "norm",
    "vector",
    "convolution",
    "not an input embedding",
    "tied to ",
    "parameter of ",
    "the model lists it in _keep_in_fp32_modules",
)


def quantize_on_the_fly(folder: Path, model: type[PreTrainedModel], dtype: torch.dtype, fields: dict[str, Any]) -> Any:
    return model.from_pretrained(folder, quantization_config=HfQuantConfig(**fields), dtype=dtype)


def assert_packed(model: PreTrainedModel) -> None:
    found = [module for _, module in packed_modules(model)]
    assert found
    for module in found:
        for name in module.float_weights:
            packed = module.packed(name)
            assert (packed.weight.dtype, packed.weight_scale.dtype) == (torch.int32, torch.int16)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_three_ways_agree(name: str, scheme: str, tmp_path: Path) -> None:
    model, fields = build(name), SCHEMES[scheme]
    before, kind = output(model, name), type(model)
    model.save_pretrained(tmp_path / "float")
    loaded = quantize_on_the_fly(tmp_path / "float", kind, torch.float32, fields)
    logits = output(loaded, name)
    assert_packed(loaded)
    assert not torch.equal(logits, before)
    assert torch.isfinite(logits).all()
    in_memory = quantize_model_ptq(kind.from_pretrained(tmp_path / "float"), progress=False, **fields)
    assert torch.equal(output(in_memory, name), logits)
    loaded.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    reloaded = kind.from_pretrained(tmp_path / "quantized")
    assert torch.equal(output(reloaded, name), logits)
    assert_packed(reloaded)
    if TINY[name].generates:
        assert torch.equal(generated(reloaded, name), generated(loaded, name))


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_stays_bfloat16(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    loaded = quantize_on_the_fly(tmp_path / "float", type(model), torch.bfloat16, {"quantization_bits": 4})
    loaded.save_pretrained(tmp_path / "quantized")
    reloaded = type(model).from_pretrained(tmp_path / "quantized")
    assert reloaded.dtype == torch.bfloat16
    assert reloaded.config.dtype == torch.bfloat16
    assert torch.equal(output(reloaded, name), output(loaded, name))


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"gemma4"}))  # its inputs hold no image
def test_static_activations_are_stored(name: str, tmp_path: Path) -> None:
    model = quantize_model_ptq(
        build(name), quantization_type="static", calibration_data=[TINY[name].inputs()], progress=False
    )
    first = output(model, name)
    scales = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("input_scale")}
    assert scales
    assert torch.equal(output(model, name), first)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in scales.items())
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(reloaded, name), first)
    assert not torch.equal(first, output(build(name), name))


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_accounted_for(name: str) -> None:
    model = build(name)
    weights = {key: p.numel() for key, p in model.named_parameters(remove_duplicate=False)}
    quantize_model_ptq(model, quantization_bits=4, progress=False)
    info = get_quantization_info(model)
    listed = [q.name for q in info.quantized] + [k.name for k in info.kept]
    assert sorted(listed) == sorted(weights)
    for kept in info.kept:
        known = kept.reason.startswith(EXPECTED_REASONS) or kept.reason.endswith(EXPECTED_ENDS)
        assert known, f"{kept.name}: {kept.reason}"
    assert info.coverage > TINY[name].coverage
    packed = {key for key, m in model.named_modules() if isinstance(m, PackedModule)}
    linears = {key for key, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - packed
    reasons = {k.name.rpartition(".")[0]: k.reason for k in info.kept if k.name.endswith(".weight")}
    known_reasons = ("_keep_in_fp32", "tied to", *EXPECTED_ENDS)
    assert all(any(part in reasons[key] for part in known_reasons) for key in linears)


def test_tied_tables_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = quantize_model_ptq(build("llama-tied"), quantization_bits=4, progress=False)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert reloaded.lm_head.weight_scale is reloaded.model.embed_tokens.weight_scale
    info = get_quantization_info(reloaded)
    (head,) = (q for q in info.quantized if q.name == "lm_head.weight")
    assert head.tied_to == "model.embed_tokens.weight"
    assert (head.bytes_after, head.numel) == (0, 0)


def test_base_model_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.model(**text_inputs()).last_hidden_state
        assert torch.equal(base(**text_inputs()).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(**text_inputs()).last_hidden_state, expected)


@pytest.mark.parametrize("quantized_first", [True, False])
def test_fresh_heads_are_float_and_trainable(quantized_first: bool, tmp_path: Path) -> None:
    model = build("bert")
    options = {} if quantized_first else {"quantization_config": HfQuantConfig(quantization_bits=8)}
    if quantized_first:
        quantize_model_ptq(model, quantization_bits=8, progress=False)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, **options)
    assert type(classifier.classifier) is torch.nn.Linear
    assert classifier.classifier.weight.requires_grad
    assert 0 < float(classifier.classifier.weight.detach().std()) < 0.1
    assert isinstance(classifier.bert.encoder.layer[0].output.dense, PackedModule)
    classifier(**text_inputs(), labels=torch.tensor([1])).loss.backward()
    assert classifier.classifier.weight.grad is not None
    reasons = {k.name: k.reason for k in get_quantization_info(classifier).kept}
    expected = "not quantized when the checkpoint was made" if quantized_first else "newly initialised"
    assert expected in reasons["classifier.weight"]
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.classifier.weight, classifier.classifier.weight)


@pytest.mark.parametrize("slices", [1, 2])
def test_reads_that_the_config_rules_out_keep_nothing_in_float(slices: int) -> None:
    config = BloomConfig(
        vocab_size=128, hidden_size=64, n_layer=1, n_head=4, slow_but_exact=True, pretraining_tp=slices
    )
    model = quantize_model_ptq(BloomForCausalLM(config), progress=False)
    kept = {k.name for k in get_quantization_info(model).kept if k.reason.endswith("reads this weight itself")}
    layer = "transformer.h.0"
    read = {f"{layer}.self_attention.dense.weight", f"{layer}.mlp.dense_4h_to_h.weight"}
    assert kept == (read if slices == 2 else set())


def test_the_text_model_of_gemma_4_has_a_packed_table_and_the_model_around_it_has_not() -> None:
    model = build("gemma4")
    inner = quantize_model_ptq(model.model.language_model, progress=False)
    assert isinstance(inner.embed_tokens, PackedModule)
    quantize_model_ptq(whole := build("gemma4"), progress=False)
    assert type(whole.model.language_model.embed_tokens) is type(build("gemma4").model.language_model.embed_tokens)
    assert isinstance(whole.model.language_model.embed_tokens_per_layer, PackedModule)


def test_a_model_whose_config_holds_two_texts() -> None:
    small = {"d_model": 64, "d_ff": 96, "num_layers": 1, "num_heads": 4, "d_kv": 16, "vocab_size": 128}
    decoder = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
    parts = T5Config(**small), EncodecConfig(), MusicgenDecoderConfig(**decoder)
    names = ("text_encoder", "audio_encoder", "decoder")
    config = MusicgenConfig(**{name: part.to_dict() for name, part in zip(names, parts, strict=True)})
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        config.get_text_config()
    with torch.device("meta"):
        roles = model_roles(MusicgenForConditionalGeneration(config))
    assert any(name.endswith("DenseReluDense.wo") for name in roles.weight_readers)

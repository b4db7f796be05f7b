"""``HfQuantConfig``: every field checked, defaults resolved in one place, decisions written down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant import ConfigError, HfQuantConfig, SchemeError, get_quantization_info, quantize_model_ptq
from hfquant.formats.headers import read_header
from tests.support.tiny_models import build


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_bits": 5}, "quantization_bits=5: expected one of 8, 4"),
        ({"quantization_bits": "8"}, "quantization_bits='8'"),
        ({"quantization_bits": 8.0}, "quantization_bits=8.0"),
        ({"quantization_type": "weigth_only"}, "did you mean 'weight_only'"),
        ({"group_size": 7}, "group_size=7: expected an integer from 8"),
        ({"group_size": True}, "group_size=True"),
        ({"group_size": 64.0}, "group_size=64.0"),
        ({"symmetric": 1}, "symmetric=1: expected one of True, False"),
        ({"algorithm": "gptqq"}, "algorithm='gptqq': expected one of"),
        ({"embedding_bits": 2}, "embedding_bits=2: expected one of 16, 8, 4"),
        ({"skip_modules": "lm_head"}, "skip_modules='lm_head': expected a list"),
        ({"skip_modules": [""]}, "module pattern ''"),
        ({"overrides": {"x": {"quantization_bit": 4}}}, r"overrides\['x'\].quantization_bit .*quantization_bits"),
        ({"overrides": {"x": {"quantization_bits": 2}}}, r"overrides\['x'\].quantization_bits=2"),
        ({"overrides": {"x": 4}}, r"overrides\['x'\]=4: expected a mapping"),
        ({"overrides": {"x": {"group_size": 3}}}, r"overrides\['x'\].group_size=3"),
        ({"backend": "cuda"}, "backend='cuda': expected one of 'hfquant', 'bitsandbytes'"),
        ({"strict": "yes"}, "strict='yes'"),
        ({"quantisation_bits": 4}, "quantisation_bits is not a field.*did you mean 'quantization_bits'"),
        ({"quant_method": "gptq"}, "quant_method"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HfQuantConfig(**fields)


def test_defaults() -> None:
    eight, four = HfQuantConfig().resolve(), HfQuantConfig(quantization_bits=4).resolve()
    assert (eight.bits, eight.quantization_type, eight.embedding_bits, eight.symmetric) == (8, "dynamic", 8, True)
    assert (four.bits, four.quantization_type, four.group_size) == (4, "weight_only", None)
    assert all(getattr(HfQuantConfig(), name) is None for name in ("quantization_bits", "symmetric", "group_size"))


def test_the_decisions_stand_in_config_json(tmp_path: Path) -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, skip_modules=["layers.0.mlp"], progress=False)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "hfquant"
    assert written["format_version"] == 1
    assert written["modules"]["model.layers.1.mlp.down_proj"] == "int4-g32"
    assert written["modules"]["model.layers.1.self_attn.q_proj"] == "int4-channel"  # 64 inputs: one group
    assert written["modules"]["lm_head"] == "int8-channel"
    assert not any(name.startswith("model.layers.0.mlp") for name in written["modules"])
    assert {"strict", "dequantize", "requested"}.isdisjoint(written)
    again = HfQuantConfig(**written)
    assert again.to_dict() == written


def test_equal_content_has_an_equal_save_id(tmp_path: Path) -> None:
    ids = []
    for folder, bits in (("a", 4), ("b", 4), ("c", 8)):
        quantize_model_ptq(build("llama"), quantization_bits=bits, progress=False).save_pretrained(tmp_path / folder)
        ids.append(json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]["save_id"])
    assert ids[0] == ids[1] != ids[2]
    headers = [read_header(tmp_path / folder / "model.safetensors").metadata for folder in ("a", "b")]
    assert headers[0] == headers[1]


def test_a_group_that_does_not_divide_lists_all_layers_before_any_work() -> None:
    model = build("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SchemeError) as caught:
        quantize_model_ptq(model, quantization_bits=4, group_size=64, progress=False)
    for layer in (0, 1):
        assert f"model.layers.{layer}.mlp.down_proj: in_features=96, group_size=64; use 32, 16 or -1" in str(
            caught.value
        )
    assert "up_proj" not in str(caught.value)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_overrides_change_single_layers() -> None:
    overrides = {
        "mlp": {"quantization_bits": 8, "quantization_type": "dynamic"},
        "model.layers.1.*": {"group_size": 16},
        "layers.0.self_attn": {"quantization_bits": 16},
    }
    model = quantize_model_ptq(build("llama"), quantization_bits=4, overrides=overrides, progress=False)
    schemes = {q.name.removesuffix(".weight"): q.scheme for q in get_quantization_info(model).quantized}
    assert schemes["model.layers.0.mlp.up_proj"] == "int8-channel-dynamic-asym"
    assert schemes["model.layers.1.mlp.up_proj"] == "int8-g16-dynamic-asym"
    assert schemes["model.layers.1.self_attn.q_proj"] == "int4-g16"
    reasons = {k.name: k.reason for k in get_quantization_info(model).kept}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "overrides: quantization_bits=16"


def test_strict_refuses_to_keep_a_linear_unasked() -> None:
    with pytest.raises(ConfigError, match=r"strict=True(?s:.*)DenseReluDense.wo: the model lists it"):
        quantize_model_ptq(build("t5"), quantization_bits=8, strict=True, progress=False)
    quantize_model_ptq(build("t5"), quantization_bits=8, strict=True, skip_modules=["wo"], progress=False)


def test_nothing_left_to_quantize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no module of this model would be quantized"):
        quantize_model_ptq(build("llama"), skip_modules=["*"], progress=False)


def test_embeddings_in_float() -> None:
    model = quantize_model_ptq(build("llama-tied"), quantization_bits=4, embedding_bits=16, progress=False)
    reasons = {k.name: k.reason for k in get_quantization_info(model).kept}
    assert reasons["model.embed_tokens.weight"] == "embedding_bits=16"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_skipping_the_head_keeps_the_table_it_is_tied_to() -> None:
    model = quantize_model_ptq(build("llama-tied"), quantization_bits=4, skip_modules=["lm_head"], progress=False)
    reasons = {k.name: k.reason for k in get_quantization_info(model).kept}
    assert reasons["model.embed_tokens.weight"] == "skip_modules"
    assert reasons["lm_head.weight"] == "tied to model.embed_tokens.weight"


def test_a_pattern_that_matches_nothing_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("llama").save_pretrained(tmp_path)
    config = HfQuantConfig(quantization_bits=4, skip_modules=["lm_haed"])
    with caplog.at_level("WARNING", logger="hfquant"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "'lm_haed'" in caplog.text


def test_info_of_models_quantized_and_not() -> None:
    plain = get_quantization_info(build("llama"))
    assert not plain.is_quantized
    assert str(plain).startswith("not quantized")
    info = get_quantization_info(quantize_model_ptq(build("llama"), quantization_bits=4, progress=False))
    content = json.loads(json.dumps(info.to_dict()))
    assert content["bytes_before"] == plain.bytes_after > content["bytes_after"]
    assert 4 < content["bits_per_weight"] < 8
    assert all(10 < q["sqnr_db"] < 60 and 0 < q["scale_min"] <= q["scale_max"] for q in content["quantized"])
    text = str(info)
    assert "INT4 weight_only" in text
    assert "model.layers.0.self_attn.q_proj.weight" in text
    assert all(k.reason in text for k in info.kept)

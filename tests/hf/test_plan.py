"""The plan, from config and headers alone."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig, SchemeError, plan_quantization
from hfquant.formats.headers import DTYPE_BYTES, read_header
from tests.support.tiny_models import build


def stored_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        for tensor in read_header(file).tensors.values():
            size = DTYPE_BYTES[tensor.dtype]
            for dimension in tensor.shape:
                size *= dimension
            total += size
    return total


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen3-moe", "opt"])
@pytest.mark.parametrize("fields", [{"quantization_bits": 4}, {"quantization_bits": 8, "embedding_bits": 16}], ids=str)
def test_the_planned_size_is_exact_and_no_weight_is_read(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = HfQuantConfig(quantization_type="weight_only", **fields)
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    data = (tmp_path / "float" / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    blank = data[:header] + bytes(len(data) - header)
    (tmp_path / "float" / "model.safetensors").write_bytes(blank)  # all weights zero: only headers count
    plan = plan_quantization(tmp_path / "float", config)
    (tmp_path / "float" / "model.safetensors").write_bytes(data)
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "out")
    assert plan.bytes_after == stored_bytes(tmp_path / "out")
    assert plan.bytes_before == stored_bytes(tmp_path / "float")
    assert plan.seconds > 0
    assert plan.peak_memory > plan.bytes_after
    assert {layer.name for layer in plan.layers} == set(quantized.config.quantization_config.modules)


def test_calibration_experts_and_misfits() -> None:
    model = build("mixtral")
    plan = plan_quantization(model, HfQuantConfig(quantization_bits=4, calibration_samples=2), calibrated=True)
    assert (plan.algorithm, plan.calibration_tokens) == ("gptq", 1024)
    assert set(plan.tokens_per_expert.values()) == {512}
    assert "about 512 tokens an expert" in str(plan)
    better = plan_quantization(model, HfQuantConfig(quantization_bits=4, calibration_samples=2, algorithm="signround"))
    assert better.seconds > plan.seconds
    with pytest.raises(SchemeError, match=r"does not divide the input of these layers:\n.*group_size=40"):
        plan_quantization(model, HfQuantConfig(quantization_bits=4, group_size=40))


def test_a_bfloat16_file_is_planned_in_bfloat16(tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path)
    config = HfQuantConfig(quantization_bits=4)
    plan = plan_quantization(str(tmp_path), config)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).save_pretrained(tmp_path / "out")
    assert plan.bytes_after == stored_bytes(tmp_path / "out")


def test_a_budget_is_planned_at_its_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfquant.hf.plan._measured_flops", lambda: 1e11)  # a busy machine must not decide
    model = build("llama")
    plan = plan_quantization(model, HfQuantConfig(target_bits=5.5, embedding_bits=16))
    assert plan.bits_per_weight == pytest.approx(5.5, rel=1e-3)
    assert {layer.scheme for layer in plan.layers} == {"4 or 8 bits, to be chosen"}
    by_size = plan_quantization(model, HfQuantConfig(target_size=70_000))
    assert by_size.bytes_after == pytest.approx(70_000, rel=1e-3)
    plain = plan_quantization(model, HfQuantConfig(quantization_bits=4, embedding_bits=16))
    assert plan.seconds > plain.seconds

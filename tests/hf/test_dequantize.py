"""Dequantized models are standard models: classes, names, config, and plain Transformers loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hfquant import ConfigError, HfQuantConfig, dequantize_model, get_quantization_info, quantize_model_ptq
from tests.support.processes import BLOCKED, compare_in_new_process, save_with_expectation
from tests.support.tiny_models import TINY, build, output
from tests.support.tolerance import SAME_VALUES, assert_close


def plain_config(model: Any) -> dict[str, Any]:
    ignored = ("_name_or_path", "transformers_version", "dtype", "architectures")
    return {key: value for key, value in model.config.to_dict().items() if key not in ignored}


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("name", TINY)
def test_no_trace_is_left(name: str) -> None:
    model = build(name)
    classes = {key: type(module) for key, module in model.named_modules()}
    config, keys, ties = plain_config(model), list(model.state_dict()), dict(model.all_tied_weights_keys)
    quantize_model_ptq(model, quantization_bits=4, progress=False)
    quantized = output(model, name)
    returned = dequantize_model(model)
    assert returned is model
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    assert plain_config(model) == config
    assert "quantization" not in json.dumps(model.config.to_dict(), default=str)
    assert dict(model.all_tied_weights_keys) == ties
    assert not hasattr(model, "hf_quantizer")
    assert not get_quantization_info(model).is_quantized
    torch.testing.assert_close(output(model, name), quantized, **SAME_VALUES)


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert", "vit", "opt", "gemma3"])
def test_the_forward_is_that_of_the_quantized_weights(name: str) -> None:
    model = quantize_model_ptq(build(name), quantization_bits=4, progress=False)
    quantized = output(model, name)
    assert torch.equal(output(dequantize_model(model), name), quantized)
    assert not torch.equal(quantized, output(build(name), name))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_fastest_kernels_are_as_close_as_float32_is(name: str) -> None:
    model = quantize_model_ptq(build(name), quantization_bits=4, progress=False)
    found = output(model, name)
    plain = output(dequantize_model(model), name)
    assert_close(found, output(model.double(), name), plain)


def test_plain_transformers_loads_them(tmp_path: Path) -> None:
    saved = []
    for name in ("llama-tied", "bert", "mixtral", "gpt2", "t5", "whisper", "gemma3"):
        build(name).save_pretrained(tmp_path / "float" / name)
        kind = type(build(name))
        config = HfQuantConfig(quantization_bits=4)
        model = kind.from_pretrained(tmp_path / "float" / name, quantization_config=config)
        dequantize_model(model).save_pretrained(tmp_path / name)
        again = kind.from_pretrained(tmp_path / name)
        saved.append(save_with_expectation(again, name, tmp_path / "again" / name))
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)
        assert stored_names(tmp_path / name) == stored_names(tmp_path / "float" / name)
    assert compare_in_new_process(saved, prefix=BLOCKED, HFQUANT_AUTOLOAD="0") == []


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return sorted(tensors.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_is_in_the_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    model = dequantize_model(quantize_model_ptq(build("llama"), quantization_bits=8, progress=False), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert output(model, "llama").dtype == dtype


def test_the_methods_of_transformers_do_the_same(tmp_path: Path) -> None:
    quantize_model_ptq(build("llama"), quantization_bits=4, progress=False).save_pretrained(tmp_path)
    expected = dequantize_model(AutoModelForCausalLM.from_pretrained(tmp_path)).state_dict()
    by_method = AutoModelForCausalLM.from_pretrained(tmp_path)
    by_method.dequantize()
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        by_config = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig(dequantize=True))
    for model in (by_method, by_config):
        assert type(model.lm_head) is torch.nn.Linear
        assert "quantization_config" not in model.config.to_dict()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
        model.save_pretrained(tmp_path / "plain")
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").lm_head) is torch.nn.Linear


def test_a_model_that_was_just_saved_dequantizes(tmp_path: Path) -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    model.save_pretrained(tmp_path)  # Transformers leaves the name of the dtype in the config
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(model.lm_head) is torch.nn.Linear


def test_a_float_model_has_nothing_to_dequantize() -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        dequantize_model(build("llama"))


def test_a_dequantized_model_can_be_quantized_again() -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=8, quantization_type="weight_only", progress=False)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    quantize_model_ptq(dequantize_model(model), quantization_bits=8, quantization_type="weight_only", progress=False)
    assert list(model.state_dict()) == list(first)
    assert get_quantization_info(model).is_quantized

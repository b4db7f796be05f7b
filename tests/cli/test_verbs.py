"""info, evaluate, generate and dequantize."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import Result

from hfquant.cli.text import text_windows


Run = Callable[..., Result]
RunJson = Callable[..., Any]
Refused = Callable[..., str]


def test_info_lists_what_is_quantized_and_what_is_kept(quantized_model: Path, run: Run, run_json: RunJson) -> None:
    found = run_json("info", quantized_model)
    assert (found["is_quantized"], found["quantization_bits"]) == (True, 4)
    assert {q["scheme"] for q in found["quantized"]} == {"int4-g32", "int8-channel"}
    assert {k["reason"] for k in found["kept"]} == {"norm"}
    assert "model.layers.0.mlp.down_proj.weight" in run("info", quantized_model).stdout


def test_info_says_that_a_model_is_not_quantized(float_model: Path, run: Run, run_json: RunJson) -> None:
    assert run("info", float_model).stdout.startswith("not quantized")
    assert run_json("info", float_model)["is_quantized"] is False


def test_info_prints_json_that_json_knows(quantized_model: Path, run: Run) -> None:
    text = run("info", quantized_model, "--json").stdout
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["is_quantized"] is True


def test_evaluate_alone(float_model: Path, text_file: Path, run_json: RunJson) -> None:
    found = run_json("evaluate", float_model, "--text", text_file, "--tokens", 200, "--context", 64)
    assert found["tokens"] == 200 - 4
    assert found["perplexity"] == pytest.approx(258, rel=0.1)  # random weights: close to uniform


def test_evaluate_against_the_original(
    float_model: Path, quantized_model: Path, text_file: Path, run_json: RunJson
) -> None:
    words = ("--text", text_file, "--tokens", 200, "--context", 64)
    found = run_json("evaluate", quantized_model, "--reference", float_model, *words)
    alone = run_json("evaluate", float_model, *words)
    assert found["reference_perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert 0 < found["mean_kl"] < 0.1
    assert 0 < found["top1_agreement"] <= 1
    same = run_json("evaluate", float_model, "--reference", float_model, *words)
    assert same["mean_kl"] == pytest.approx(0, abs=1e-9)
    assert same["top1_agreement"] == 1


def test_evaluate_has_a_text_of_its_own(float_model: Path, run: Run) -> None:
    result = run("evaluate", float_model, "--tokens", 64, "--context", 32)
    assert result.exit_code == 0
    assert "perplexity" in result.stdout


def test_evaluate_refuses_more_context_than_positions(float_model: Path, refused: Refused) -> None:
    assert "has 128 positions" in refused("evaluate", float_model, "--tokens", 64)


def test_generate(quantized_model: Path, run: Run, run_json: RunJson) -> None:
    found = run_json("generate", quantized_model, "--prompt", "hello", "--max-new-tokens", 5)
    assert 1 <= found["tokens"] <= 5
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    plain = run("generate", quantized_model, "--prompt", "hello", "--max-new-tokens", 5)
    assert plain.stdout == found["answer"] + "\n"


def test_generate_can_leave_the_chat_template_out(
    quantized_model: Path, run_json: RunJson, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = ("generate", quantized_model, "--prompt", "hello", "--max-new-tokens", 4)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(quantized_model)
    new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert run_json(*words, "--no-chat")["answer"] == tokenizer.decode(new, skip_special_tokens=True)


def test_encoders_do_not_generate(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, refused: Refused) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "BertModel" in refused("generate", tmp_path, "--prompt", "hello")
    assert "BertModel" in refused("evaluate", tmp_path)


def test_model_without_tokenizer(quantized_model: Path, tmp_path: Path, refused: Refused) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((quantized_model / name).read_bytes())
    assert "its tokenizer cannot be loaded" in refused("generate", tmp_path, "--prompt", "hello")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantize_gives_a_plain_model(dtype: str, quantized_model: Path, tmp_path: Path, run_json: RunJson) -> None:
    out = tmp_path / "out"
    found = run_json("dequantize", quantized_model, "-o", out, "--dtype", dtype)
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert not any("scale" in name or "zero_point" in name for name in tensors)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.json").is_file()
    assert found["file_bytes"] == (out / "model.safetensors").stat().st_size
    ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        floats, codes = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (out, quantized_model))
    if dtype == "float32":
        torch.testing.assert_close(floats, codes, rtol=1e-5, atol=1e-6)
    else:
        assert math.isclose(float(floats.float().norm()), float(codes.norm()), rel_tol=0.02)


def test_dequantize_refusals(float_model: Path, quantized_model: Path, tmp_path: Path, refused: Refused) -> None:
    assert "nothing to dequantize" in refused("dequantize", float_model, "-o", tmp_path / "out")
    assert "--overwrite" in refused("dequantize", quantized_model, "-o", float_model)
    assert "expected one of float32" in refused("dequantize", quantized_model, "-o", tmp_path / "o", "--dtype", "int8")
    assert list(tmp_path.iterdir()) == []


def test_windows_carry_the_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text_windows(tokenizer, "x" * 25, 12)
    assert [window.shape[1] for window in windows] == [12, 12, 7]
    assert all(window[0, 0] == 256 and window[0, -1] == 257 for window in windows)

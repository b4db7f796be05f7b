"""hfquant train: from a YAML file to a quantized model, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfquant import get_quantization_info


TRAINING = sorted((Path(__file__).parents[2] / "configs").glob("qat-*.yaml"))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_every_training_config_trains(
    path: Path, float_model: Path, tmp_path: Path, run_json: Callable[..., Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    settings = "".join(
        line
        for line in path.read_text().splitlines(keepends=True)
        if not line.startswith(("max_steps", "warmup_steps", "context", "logging_steps", "save_steps"))
    )
    small = tmp_path / "run.yaml"
    small.write_text(settings + "max_steps: 2\ncontext: 16\nlogging_steps: 1\nsave_steps: 1\nuse_cpu: true\n")
    out = tmp_path / "out"
    given = ("train", "--config", small, "--model", float_model, "--text", text, "-o", out)
    summary = run_json(*given)
    assert (summary["mode"], summary["steps"]) == ("qat", 2)
    model = AutoModelForCausalLM.from_pretrained(out)
    info = get_quantization_info(model)
    assert info.quantization_mode == "qat"
    assert str(info.quantization_bits) in path.stem
    assert (out / "tokenizer.json").is_file()
    assert (out / "LICENSE").is_file()
    weights = load_file(out / "model.safetensors")
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-2")
    run_json(*given, "--resume", "--overwrite")  # from the first step
    resumed = load_file(out / "model.safetensors")
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []


@pytest.mark.parametrize("name", ["grid", "grid-delayed", "scales"])
def test_every_finetuning_config_trains(
    name: str, float_model: Path, tmp_path: Path, run_json: Callable[..., Any]
) -> None:
    text, small, quantized = tmp_path / "text.txt", tmp_path / "run.yaml", tmp_path / "quantized"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    run_json("quantize", float_model, "-o", quantized, "--bits", "4", "--keep-residual")
    path = TRAINING[0].parent / f"finetune-int4-{name}.yaml"
    adapter, delay = name.removesuffix("-delayed"), "adapter_delay_steps"
    dropped = ("max_steps", "warmup_steps", "context", "logging_steps", "save_steps", "scale_learning_rate", delay)
    lines = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith(dropped)]
    small.write_text(
        "".join(lines) + "max_steps: 2\ncontext: 16\nlogging_steps: 1\nsave_steps: 1\nuse_cpu: true\n"
        f"scale_learning_rate: 0.05\n{delay}: {int('delayed' in name)}\n"
    )
    out = tmp_path / "out"
    given = ("train", "--config", small, "--model", quantized, "--text", text, "-o", out)
    summary = run_json(*given)
    assert (summary["mode"], summary["steps"]) == ("finetune", 2)
    info = get_quantization_info(AutoModelForCausalLM.from_pretrained(out))
    assert info.finetuning.adapter == adapter
    assert info.finetuning.residual == ("ptq" if adapter == "grid" else None)
    assert info.finetuning.scales_moved > 0
    assert (out / "tokenizer.json").is_file()
    weights = load_file(out / "model.safetensors")
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-2")
    run_json(*given, "--resume", "--overwrite")  # from the first step
    resumed = load_file(out / "model.safetensors")
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []


def test_what_is_missing_or_unknown_is_named(float_model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("quantization_mode: qat\n")
    assert "text is not set" in refused("train", "--config", config, "--model", float_model, "-o", tmp_path / "out")
    config.write_text("quantization_modus: qat\nuse_cpu: true\n")
    given = ("train", "--config", config, "--model", float_model, "--text", config, "-o", tmp_path / "out")
    assert "did you mean 'quantization_mode'" in refused(*given)
    config.write_text("use_cpu: true\n")
    assert "fewer than one example of 512" in refused(*given)

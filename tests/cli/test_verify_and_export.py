"""``hfquant verify`` and ``hfquant export``."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfquant import ConfigError, quantize_model_ptq, save_quantized, verify_checkpoint
from tests.support.checkpoints import edit_bytes, edit_config, edit_header, edit_tensors, set_scale
from tests.support.tiny_models import build


DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "shards"
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


def shard_of(folder: Path, tensor: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def damage_code(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: t[f"{DOWN}.weight"].view(-1)[:1].bitwise_xor_(1), name=shard_of(folder, f"{DOWN}.weight")
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped-code": (damage_code, rf"{DOWN}.weight in model-0000.-of-0000.\.safetensors: sha256"),
    "flipped-byte": (lambda f: edit_bytes(f, flip, name=shard_of(f, f"{DOWN}.weight")), "sha256"),
    "scale": (
        lambda f: edit_tensors(
            f,
            lambda t: set_scale(t, f"{DOWN}.weight_scale", float("nan")),
            name=shard_of(f, f"{DOWN}.weight_scale"),
        ),
        "NaN or infinite",
    ),
    "missing-shard": (lambda f: (f / shard_of(f, f"{DOWN}.weight")).unlink(), "No such file"),
    "truncated": (lambda f: edit_bytes(f, lambda b: b[:-9], name=shard_of(f, f"{DOWN}.weight")), "truncated"),
    "index": (lambda f: edit_bytes(f, lambda b: b[:9], name="model.safetensors.index.json"), "not a safetensors index"),
    "no-weights": (lambda f: [file.unlink() for file in f.glob("model*")], "no weights to read"),
    "other-save": (
        lambda f: edit_header(
            f, lambda h: h["__metadata__"].update(hfquant_save_id="0" * 32), name=shard_of(f, f"{DOWN}.weight")
        ),
        "different saves|another save",
    ),
    "hashes": (
        lambda f: [
            edit_header(f, lambda h: h["__metadata__"].pop("hfquant_sha256"), name=file.name)
            for file in f.glob("*.safetensors")
        ],
        "no sha256 was recorded",
    ),
    "config": (lambda f: edit_config(f, lambda c: c["quantization_config"]["modules"].pop("lm_head")), "lm_head"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    assert verify_checkpoint(folder, progress=False).problems == ()
    damage, message = DAMAGE[name]
    damage(folder)
    problems = verify_checkpoint(folder, progress=False).problems
    assert any(re.search(message, problem) for problem in problems), problems


def test_the_command_reports_and_fails(quantized_model: Path, tmp_path: Path, run: Any, run_json: Any) -> None:
    found = run_json("verify", quantized_model)
    assert found["problems"] == []
    assert found["hashes"] == found["tensors"] > 20
    folder = tmp_path / "copy"
    shutil.copytree(quantized_model, folder)
    edit_bytes(folder, flip)
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "FormatError: 1 problems; the first: " in result.stderr
    with pytest.raises(ConfigError, match="no such folder"):
        verify_checkpoint(tmp_path / "nowhere")


def test_a_plain_module_is_verified(tmp_path: Path) -> None:
    model = quantize_model_ptq(torch.nn.Sequential(torch.nn.Linear(64, 32)), quantization_bits=4, progress=False)
    save_quantized(model, tmp_path / "model")
    assert verify_checkpoint(tmp_path / "model").problems == ()
    edit_bytes(tmp_path / "model", flip)
    assert "sha256" in verify_checkpoint(tmp_path / "model").problems[0]


def test_export_from_the_command_line(
    quantized_model: Path, float_model: Path, tmp_path: Path, run_json: Any, refused: Any
) -> None:
    out = tmp_path / "out"
    report = run_json("export", quantized_model, "-o", out, "--to", "compressed-tensors", "--for", "vllm")
    assert report["schemes"] == ["int4-g32"]
    assert set(report["dense"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert (out / "LICENSE").is_file()
    assert (out / "tokenizer.json").read_bytes() == (float_model / "tokenizer.json").read_bytes()
    assert run_json("verify", out)["hashes"] >= 5
    assert "not empty" in refused("export", quantized_model, "-o", out, "--to", "dense")
    assert "expected one of" in refused("export", quantized_model, "-o", tmp_path / "x", "--to", "awq")
    assert "it is not quantized" in refused("export", float_model, "-o", tmp_path / "x", "--to", "gptq")


def test_export_says_what_a_narrow_dtype_costs(
    run_json: Callable[..., Any], refused: Callable[..., str], quantized_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What a narrower dtype costs is measured, and not guessed. " * 4)
    to = ["export", quantized_model, "--to", "compressed-tensors", "--evaluate", text]
    cost = {
        dtype: run_json(*to, "-o", tmp_path / dtype, "--dtype", dtype)["dtype_cost"]["mean_kl"]
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert max(cost["float32"], cost["float16"]) < cost["bfloat16"] < 1e-2
    assert "--evaluate measures what --dtype costs" in refused(*to, "-o", tmp_path / "x")
    missing = [*to[:-1], tmp_path / "none.txt", "-o", tmp_path / "x", "--dtype", "bfloat16"]
    assert "none.txt: cannot be read" in refused(*missing)
    assert not (tmp_path / "x").exists()  # before any work

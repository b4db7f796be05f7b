"""hfquant quantize: what is written, what is refused, and what an earlier checkpoint in the way goes through."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import Result

from hfquant import HfQuantConfig, get_quantization_info


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "ptq").glob("*.yaml"))

Run = Callable[..., Result]
RunJson = Callable[..., Any]
Refused = Callable[..., str]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_saves_what_from_pretrained_gives(float_model: Path, tmp_path: Path, run_json: RunJson) -> None:
    summary = run_json("quantize", float_model, "-o", tmp_path / "out", "--bits", 4, "--group-size", 32)
    config = HfQuantConfig(quantization_bits=4, group_size=32)
    expected = AutoModelForCausalLM.from_pretrained(float_model, quantization_config=config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
        assert not torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(float_model)(ids).logits)
    info = get_quantization_info(loaded)
    assert (summary["bits"], summary["type"], summary["embedding_bits"]) == (4, "weight_only", 8)
    assert summary["quantized_parameters"] == len(info.quantized) == 16
    assert summary["bytes_after"] == info.bytes_after < summary["bytes_before"]
    assert summary["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_tokenizer_and_licence_go_along_byte_for_byte(float_model: Path, quantized_model: Path) -> None:
    written = {"config.json", "generation_config.json", "model.safetensors", "quality_report.json"}
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}
    assert names(quantized_model) == written | copied
    for name in copied:
        assert (quantized_model / name).read_bytes() == (float_model / name).read_bytes()
    assert AutoTokenizer.from_pretrained(quantized_model)("hi")["input_ids"][0] == 256


def test_table_without_json(float_model: Path, tmp_path: Path, run: Run) -> None:
    result = run("quantize", float_model, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "dynamic" in result.stdout
    assert "file bytes" in result.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_command_in_first_line_of_config_runs(
    path: Path, float_model: Path, text_file: Path, tmp_path: Path, run_json: RunJson
) -> None:
    command = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# hfquant ").split()
    places = {"MODEL": float_model, "OUT": tmp_path / "out", "TEXT_FILE": text_file}
    run_json(*(places.get(word, ROOT / word if word.startswith("configs/") else word) for word in command))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_quantized


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
def test_options_win_over_the_file(name: str, float_model: Path, tmp_path: Path, run_json: RunJson) -> None:
    (tmp_path / name).write_text('{"quantization_bits": 4, "group_size": 64, "embedding_bits": 16}', encoding="utf-8")
    run_json("quantize", float_model, "-o", tmp_path / "out", "--config", tmp_path / name, "--group-size", 16)
    found = stored(tmp_path / "out")
    assert (found["quantization_bits"], found["group_size"], found["embedding_bits"]) == (4, 16, 16)


def test_every_option_reaches_the_checkpoint(float_model: Path, tmp_path: Path, run_json: RunJson) -> None:
    words = "--bits 4 --group-size -1 --asymmetric --algorithm rtn --embedding-bits 4 --skip q_proj --skip layers.1"
    run_json("quantize", float_model, "-o", tmp_path / "out", *words.split(), "--dtype", "bfloat16")
    found = stored(tmp_path / "out")
    assert (found["group_size"], found["symmetric"], found["algorithm"]) == (-1, False, "rtn")
    assert found["skip_modules"] == ["q_proj", "layers.1"]
    assert not any("q_proj" in name or "layers.1" in name for name in found["modules"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_small_shards(float_model: Path, tmp_path: Path, run_json: RunJson) -> None:
    summary = run_json("quantize", float_model, "-o", tmp_path / "out", "--max-shard-size", "40KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert summary["file_bytes"] == sum(shard.stat().st_size for shard in shards)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_quantized


def test_static_stores_activation_scales(float_model: Path, text_file: Path, tmp_path: Path, run_json: RunJson) -> None:
    words = ("--type", "static", "--calibration", text_file, "--calibration-batches", 3)
    assert run_json("quantize", float_model, "-o", tmp_path / "out", *words)["type"] == "static"
    keys = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert "model.layers.0.mlp.down_proj.input_scale" in keys


def test_static_encoder_and_encoder_decoder(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, run_json: RunJson
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    models = {
        "bert": BertModel(BertConfig(vocab_size=258, max_position_embeddings=40, **sizes)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=258, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        out = tmp_path / f"{name}-int8"
        summary = run_json("quantize", tmp_path / name, "-o", out, "--type", "static", "--calibration", text_file)
        assert summary["type"] == "static"
        assert json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_static_needs_calibration_before_any_work(float_model: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--calibration FILE" in refused("quantize", float_model, "-o", tmp_path / "out", "--type", "static")
    override = {"overrides": {"down_proj": {"quantization_type": "static"}}}
    (tmp_path / "c.json").write_text(json.dumps(override), encoding="utf-8")
    message = refused("quantize", float_model, "-o", tmp_path / "out", "--config", tmp_path / "c.json")
    assert "--calibration FILE" in message
    assert names(tmp_path) == {"c.json"}


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "cannot be read"), (b" \n", "no text in it"), (b"\xff\xfe\xff", "not UTF-8")]
)
def test_unusable_calibration_file(
    content: bytes | None, expected: str, float_model: Path, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "calibration.txt"
    if content is not None:
        file.write_bytes(content)
    words = ("--type", "static", "--calibration", file)
    assert expected in refused("quantize", float_model, "-o", tmp_path / "out", *words)


def test_calibration_that_is_not_used_draws_a_warning(
    float_model: Path, text_file: Path, tmp_path: Path, run: Run
) -> None:
    words = ("--algorithm", "search", "--calibration", text_file)
    with pytest.warns(UserWarning, match="calibration_data is not used"):
        run("quantize", float_model, "-o", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("quantisation_bits: 4", "did you mean 'quantization_bits'"),
        ("quantization_bits: 5", "expected one of 8, 4"),
        ("quantization_bits: '4'", "expected one of 8, 4"),
        ("[4]", "expected a mapping of fields, found list"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("overrides: {down_proj: {bit: 8}}", "is not a field"),
    ],
)
def test_wrong_config_file(content: str, expected: str, float_model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    assert expected in refused("quantize", float_model, "-o", tmp_path / "out", "--config", tmp_path / "c.yaml")


def test_missing_config_file(float_model: Path, tmp_path: Path, refused: Refused) -> None:
    message = refused("quantize", float_model, "-o", tmp_path / "out", "--config", tmp_path / "nothing.yaml")
    assert "nothing.yaml: cannot be read" in message


def test_group_that_does_not_divide_lists_all_layers(float_model: Path, tmp_path: Path, run: Run) -> None:
    result = run("quantize", float_model, "-o", tmp_path / "out", "--bits", 4, "--group-size", 24)
    assert result.exit_code == 1
    assert result.stderr.count("group_size=24") == 14
    assert names(tmp_path) == set()


def test_existing_output_is_kept_without_overwrite(float_model: Path, quantized_model: Path, refused: Refused) -> None:
    before = (quantized_model / "model.safetensors").read_bytes()
    assert "--overwrite" in refused("quantize", float_model, "-o", quantized_model)
    assert (quantized_model / "model.safetensors").read_bytes() == before


def test_overwrite_replaces_the_whole_folder(float_model: Path, tmp_path: Path, run_json: RunJson) -> None:
    out = tmp_path / "out"
    run_json("quantize", float_model, "-o", out, "--max-shard-size", "40KB")
    run_json("quantize", float_model, "-o", out, "--bits", 4, "--overwrite")
    assert stored(out)["quantization_bits"] == 4
    assert not list(out.glob("model-*")), "shards of the earlier checkpoint"
    assert names(tmp_path) == {"out"}


def test_failure_while_saving_leaves_the_old_checkpoint(
    float_model: Path, tmp_path: Path, run_json: RunJson, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_json("quantize", float_model, "-o", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfquant.cli.quantize.copy_companion_files", full_disk)
    assert "No space left" in refused("quantize", float_model, "-o", out, "--bits", 4, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == {"out", ".out.resume"}  # the next try goes on from here


def test_overwrite_spares_folders_that_are_no_checkpoint(float_model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "summer.txt").write_text("dear", encoding="utf-8")
    assert "no config.json" in refused("quantize", float_model, "-o", tmp_path / "photos", "--overwrite")
    assert names(tmp_path / "photos") == {"summer.txt"}


def test_the_model_itself_is_no_output(float_model: Path, refused: Refused) -> None:
    assert "the model itself" in refused("quantize", float_model, "-o", float_model, "--overwrite")


def test_quantized_models_are_not_quantized_again(quantized_model: Path, tmp_path: Path, refused: Refused) -> None:
    assert "quantized already" in refused("quantize", quantized_model, "-o", tmp_path / "out")

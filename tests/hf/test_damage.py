"""Damaged checkpoints: each is refused with an error that names the culprit; none loads."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant import ConfigError, FormatError, HfQuantConfig, quantize_model_ptq
from hfquant.numerics.affine import scale_from_bits
from tests.support.checkpoints import edit_bytes, edit_config, edit_header, edit_tensors, set_scale
from tests.support.tiny_models import build


Damage = Callable[[Path], None]

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file, several shards, static, and another model of the same shape; ``odd`` rows leave padding."""
    root = tmp_path_factory.mktemp("checkpoints")
    data = [{"input_ids": torch.arange(3, 19).unsqueeze(0)}]
    builds: dict[str, tuple[str, dict[str, Any], str]] = {
        "int4": ("llama-odd", {"quantization_bits": 4, "embedding_bits": 4}, "5GB"),
        "int8": ("llama-odd", {"quantization_bits": 8}, "5GB"),
        "asymmetric": ("llama-odd", {"quantization_bits": 4, "symmetric": False}, "5GB"),
        "shards": ("llama-odd", {"quantization_bits": 4}, "4KB"),
        "static": ("llama-odd", {"quantization_type": "static", "calibration_data": data}, "5GB"),
        "other": ("llama-odd", {"quantization_bits": 4, "embedding_bits": 4, "algorithm": "rtn"}, "5GB"),
    }
    for name, (model, fields, size) in builds.items():
        quantize_model_ptq(build(model), progress=False, **fields).save_pretrained(root / name, max_shard_size=size)
    assert len(list((root / "shards").glob("*.safetensors"))) > 2
    return {name: root / name for name in builds}


def config(**fields: Any) -> Damage:
    """Set fields of ``quantization_config``; ``...`` removes one."""

    def change(content: dict[str, Any]) -> None:
        for key, value in fields.items():
            if value is ...:
                del content["quantization_config"][key]
            else:
                content["quantization_config"][key] = value

    return lambda folder: edit_config(folder, change)


def module(name: str, scheme: Any) -> Damage:
    """Set the scheme of one module; ``...`` removes it."""

    def change(content: dict[str, Any]) -> None:
        modules = content["quantization_config"]["modules"]
        modules[name] = scheme
        if scheme is ...:
            del modules[name]

    return lambda folder: edit_config(folder, change)


def model_config(**fields: Any) -> Damage:
    return lambda folder: edit_config(folder, lambda content: content.update(fields))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda folder: edit_tensors(folder, change)


def scale(name: str, value: float) -> Damage:
    return tensors(lambda t: set_scale(t, name, value))


def value(name: str, number: float) -> Damage:
    return tensors(lambda t: t[name].view(-1).__setitem__(0, number))


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda t: t.__setitem__(name, make(t[name]).contiguous()))


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda folder: edit_header(folder, change)


def data(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: edit_bytes(folder, change)


CONFIG_DAMAGE: dict[str, tuple[Damage, str]] = {
    "bits-3": (config(quantization_bits=3), "quantization_bits=3"),
    "bits-string": (config(quantization_bits="4"), "quantization_bits='4'"),
    "bits-bool": (config(quantization_bits=True), "quantization_bits=True"),
    "type-unknown": (config(quantization_type="weightonly"), "quantization_type.*weight_only"),
    "group-zero": (config(group_size=0), "group_size=0"),
    "group-huge": (config(group_size=2**40), "group_size="),
    "symmetric-string": (config(symmetric="yes"), "symmetric='yes'"),
    "algorithm-unknown": (config(algorithm="magic"), "algorithm='magic'"),
    "embedding-bits-7": (config(embedding_bits=7), "embedding_bits=7"),
    "skip-modules-string": (config(skip_modules="lm_head"), "skip_modules"),
    "skip-modules-number": (config(skip_modules=[3]), "module pattern 3"),
    "overrides-list": (config(overrides=[1]), "overrides"),
    "overrides-unknown-field": (config(overrides={"mlp": {"bits": 4}}), "overrides.*bits"),
    "backend-unknown": (config(backend="cuda"), "backend='cuda'"),
    "unknown-field": (config(quantization_bit=4), "quantization_bit.*did you mean 'quantization_bits'"),
    "version-missing-type": (config(format_version="1"), "format_version='1'"),
    "version-zero": (config(format_version=0), "format_version=0"),
    "version-newer": (config(format_version=2, hfquant_version="9.1"), "format version 2.*needs hfquant 9.1"),
    "save-id-missing": (config(save_id=...), "save_id=None"),
    "save-id-other": (config(save_id="0" * 32), "another save"),
    "save-id-number": (config(save_id=7), "save_id=7"),
    "modules-missing": (config(modules=...), "modules=None"),
    "modules-empty": (config(modules={}), "modules={}"),
    "modules-list": (config(modules=[Q]), "modules="),
    "module-unknown": (module("model.layers.9.mlp.up_proj", "int4-channel"), "model.layers.9.mlp.up_proj"),
    "module-is-a-norm": (module("model.norm", "int4-channel"), "model.norm"),
    "module-scheme-unknown": (module(Q, "int3-g64"), rf"{Q}.*int3-g64"),
    "module-scheme-number": (module(Q, 4), Q),
    "module-group-does-not-divide": (module(Q, "int4-g7"), rf"{Q}.*int4-g7.*36"),
    "module-other-bits": (module(Q, "int8-channel"), rf"{Q}\.weight"),
    "module-other-group": (module(Q, "int4-g9"), Q),
    "module-asymmetric": (module(Q, "int4-channel-asym"), rf"{Q}\.weight_zero_point is missing"),
    "module-static": (module(Q, "int4-channel-static"), rf"{Q}\.input_scale is missing"),
    "module-left-out": (module(Q, ...), rf"{Q}\.weight"),
    "hidden-size": (model_config(hidden_size=48), "expected"),
    "intermediate-size": (model_config(intermediate_size=52), "mlp"),
    "vocabulary": (model_config(vocab_size=102), "embed_tokens|lm_head"),
    "fewer-layers": (model_config(num_hidden_layers=1), r"layers\.1"),
    "more-layers": (model_config(num_hidden_layers=3), r"layers\.2"),
    "architecture": (model_config(architectures=["LlamaForCausalLM"], attention_bias=True), "bias is missing"),
}

TENSOR_DAMAGE: dict[str, tuple[Damage, str]] = {
    "weight-missing": (tensors(lambda t: t.pop(f"{Q}.weight")), rf"{Q}\.weight is missing"),
    "scale-missing": (tensors(lambda t: t.pop(f"{Q}.weight_scale")), rf"{Q}\.weight_scale is missing"),
    "norm-missing": (tensors(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "embedding-missing": (tensors(lambda t: t.pop("model.embed_tokens.weight")), "embed_tokens.weight is missing"),
    "tensor-extra": (tensors(lambda t: t.update(extra=torch.ones(2))), "extra.*not a tensor of this model"),
    "zero-point-extra": (
        tensors(lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(30, 1, dtype=torch.int32)})),
        rf"{Q}\.weight_zero_point",
    ),
    "weight-shape": (replace(f"{Q}.weight", lambda x: x[:-1]), rf"{Q}\.weight.*expected I32 \[30, 5\], found I32 \[29"),
    "weight-transposed": (replace(f"{Q}.weight", torch.t), rf"{Q}\.weight.*expected"),
    "weight-float": (replace(f"{Q}.weight", torch.Tensor.float), rf"{Q}\.weight.*I32.*F32"),
    "weight-int64": (replace(f"{Q}.weight", torch.Tensor.long), rf"{Q}\.weight.*I32.*I64"),
    "weight-unpacked": (replace(f"{Q}.weight", lambda _: torch.zeros(30, 36)), rf"{Q}\.weight.*F32 \[30, 36\]"),
    "scale-shape": (replace(f"{Q}.weight_scale", lambda x: x[:, :0]), rf"{Q}\.weight_scale"),
    "scale-bfloat16": (replace(f"{Q}.weight_scale", lambda x: x.view(torch.bfloat16)), rf"{Q}\.weight_scale.*BF16"),
    "scale-nan": (scale(f"{Q}.weight_scale", float("nan")), rf"{Q}\.weight_scale.*1 values are NaN"),
    "scale-infinite": (scale(f"{Q}.weight_scale", float("-inf")), rf"{Q}\.weight_scale.*NaN or infinite"),
    "scale-zero": (scale(f"{Q}.weight_scale", 0.0), rf"{Q}\.weight_scale.*zero"),
    "embedding-scale-nan": (scale("model.embed_tokens.weight_scale", float("nan")), "embed_tokens.weight_scale"),
    "norm-nan": (value(NORM, float("nan")), f"{NORM}.*NaN"),
    "norm-infinite": (value(NORM, float("inf")), f"{NORM}.*infinite"),
    "norm-integer": (replace(NORM, torch.Tensor.int), f"{NORM}.*I32"),
    "norm-shape": (replace(NORM, lambda x: x[1:]), f"{NORM}.*35"),
    "padding-set": (tensors(lambda t: t[f"{Q}.weight"].__setitem__((0, -1), -1)), rf"{Q}\.weight.*behind the 36"),
    "renamed": (tensors(lambda t: t.update({"model.final.weight": t.pop(NORM)})), f"{NORM} is missing"),
}

FILE_DAMAGE: dict[str, tuple[Damage, str]] = {
    "empty": (data(lambda b: b""), "truncated"),
    "cut-in-length": (data(lambda b: b[:5]), "truncated"),
    "cut-in-header": (data(lambda b: b[:100]), "truncated"),
    "cut-in-data": (data(lambda b: b[: len(b) // 2]), "truncated"),
    "cut-last-byte": (data(lambda b: b[:-1]), "truncated"),
    "bytes-appended": (data(lambda b: b + b"\0" * 8), "8 bytes behind"),
    "header-length-absurd": (data(lambda b: struct.pack("<Q", 2**60) + b[8:]), "truncated"),
    "header-not-json": (data(lambda b: b[:8] + b"x" + b[9:]), "not JSON"),
    "header-offset": (header(lambda h: h[NORM]["data_offsets"].__setitem__(1, 8)), NORM),
    "header-overlap": (header(lambda h: h[NORM].update(data_offsets=[0, 144])), "begins at byte"),
    "header-shape-lies": (header(lambda h: h[NORM].update(shape=[37])), NORM),
    "header-dtype-unknown": (header(lambda h: h[NORM].update(dtype="F31")), NORM),
    "header-shape-negative": (header(lambda h: h[NORM].update(shape=[-36])), NORM),
    "metadata-without-save-id": (header(lambda h: h["__metadata__"].pop("hfquant_save_id")), "another save"),
    "metadata-missing": (header(lambda h: h.pop("__metadata__")), "another save"),
}


def refused(folder: Path, match: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=match):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", [*CONFIG_DAMAGE, *TENSOR_DAMAGE, *FILE_DAMAGE])
def test_damage_is_refused(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    damage, match = (CONFIG_DAMAGE | TENSOR_DAMAGE | FILE_DAMAGE)[name]
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "copy"))
    AutoModelForCausalLM.from_pretrained(folder)  # whole before
    damage(folder)
    refused(folder, f"(?s){match}")


@pytest.mark.parametrize("number", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("int8", f"{Q}.weight_scale"), ("static", f"{Q}.input_scale"), ("asymmetric", f"{Q}.weight_scale")],
)
def test_scales_that_must_be_positive(
    kind: str, tensor: str, number: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints[kind], tmp_path / "copy"))
    edit_tensors(folder, lambda t: set_scale(t, tensor, number))
    refused(folder, f"{tensor}.*(NaN|positive)")


def test_four_bit_scales_may_be_negative(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "copy"))
    edit_tensors(folder, lambda t: set_scale(t, f"{Q}.weight_scale", -0.01))
    scales = scale_from_bits(AutoModelForCausalLM.from_pretrained(folder).get_parameter(f"{Q}.weight_scale"))
    assert bool((scales == torch.tensor(-0.01).bfloat16()).any())


def shard_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rename_shard(folder: Path, new: str) -> None:
    """Let the index name the first shard ``new``, and put the file there."""
    first = shard_names(folder)[0]
    target = (folder / new).resolve() if not Path(new).is_absolute() else Path(new)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / first).rename(target)

    def change(content: dict[str, Any]) -> None:
        content["weight_map"] = {k: new if v == first else v for k, v in content["weight_map"].items()}

    edit_index(folder, change)


@pytest.mark.parametrize("kind", ["parent", "subfolder", "absolute"])
def test_shard_names_with_paths_are_refused(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    outside = tmp_path / "outside" / "x.safetensors"
    rename_shard(
        folder, {"parent": "../outside/x.safetensors", "subfolder": "in/x.safetensors"}.get(kind, str(outside))
    )
    refused(folder, "shard")


def test_missing_shard_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    (folder / shard_names(folder)[1]).unlink()
    with pytest.raises(FormatError, match=r"model-00002.*No such file"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_shard_dropped_from_the_index_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    second = shard_names(folder)[1]
    edit_index(folder, lambda c: c.update(weight_map={k: v for k, v in c["weight_map"].items() if v != second}))
    refused(folder, "is missing from the checkpoint")


def test_index_that_is_not_json_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):  # from Transformers
        AutoModelForCausalLM.from_pretrained(folder)


def test_shards_of_two_saves_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    second = shard_names(folder)[1]
    edit_header(folder, lambda h: h["__metadata__"].update(hfquant_save_id="f" * 32), name=second)
    refused(folder, f"{second} is of another save")


def test_stale_single_file_beside_newer_shards_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    shutil.copyfile(checkpoints["other"] / "model.safetensors", folder / "model.safetensors")
    refused(folder, "model.safetensors is of another save")


def test_torn_save_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "model"))
    shutil.copyfile(checkpoints["other"] / "config.json", folder / "config.json")
    refused(folder, "another save")


def test_tensor_in_two_shards_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["shards"], tmp_path / "model"))
    first, second = shard_names(folder)[:2]
    stolen: dict[str, torch.Tensor] = {}
    edit_tensors(folder, lambda t: stolen.update(list(t.items())[:1]), name=first)
    edit_tensors(folder, lambda t: t.update(stolen), name=second)
    refused(folder, "stands in both")


def test_pickled_weights_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "safetensors files only")


def test_config_that_is_not_json_is_refused_by_transformers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "model"))
    edit_bytes(folder, lambda b: b[: len(b) // 2], name="config.json")
    with pytest.raises(OSError, match="not a valid JSON file"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_another_method_in_the_config_does_not_load(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "model"))
    edit_config(folder, lambda c: c["quantization_config"].update(quant_method="hfquantum"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # Transformers: shapes differ
        AutoModelForCausalLM.from_pretrained(folder)


def test_config_without_quantization_does_not_load(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["int4"], tmp_path / "model"))
    edit_config(folder, lambda c: c.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # Transformers: shapes differ
        AutoModelForCausalLM.from_pretrained(folder)


def test_there_are_at_least_sixty_kinds() -> None:
    assert len(CONFIG_DAMAGE) + len(TENSOR_DAMAGE) + len(FILE_DAMAGE) >= 60


def test_nothing_is_quantized_again(checkpoints: dict[str, Path]) -> None:
    config = HfQuantConfig(quantization_bits=8)
    with (
        pytest.warns(UserWarning, match="already has a `quantization_config`"),
        pytest.raises(ConfigError, match="quantization_bits=8 was asked for.*quantization_bits=4"),
    ):
        AutoModelForCausalLM.from_pretrained(checkpoints["int4"], quantization_config=config)

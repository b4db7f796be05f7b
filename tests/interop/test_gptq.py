"""GPTQ exports, read back by an unpacker written from the format's definition."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hfquant import ConfigError, SchemeError, export_model, quantize_model_ptq
from tests.support.tiny_models import build


# Bit for bit against engines that multiply in float: the claim of the reference kernels.
pytestmark = pytest.mark.usefixtures("reference_kernels")


def unpacked(tensors: dict[str, Tensor], bits: int, *, version: int) -> Tensor:
    """Weight ``[N, K]``, float64, as a reader computes it: words as unsigned integers, code by code."""
    words = tensors["qweight"].numpy().view(np.uint32)
    zeros = tensors["qzeros"].numpy().view(np.uint32).copy()
    if version == 1:  # readers add 1 to every code of a word at once
        zeros += np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    mask, per_word = (1 << bits) - 1, 32 // bits
    rows, columns = words.shape[0] * per_word, words.shape[1]
    codes = np.array([(words[k // per_word] >> (k % per_word * bits)) & mask for k in range(rows)], dtype=np.int64)
    zero = np.array([(zeros[:, n // per_word] >> (n % per_word * bits)) & mask for n in range(columns)], dtype=np.int64)
    group = tensors["g_idx"].numpy()
    scale = tensors["scales"].double().numpy()
    return torch.from_numpy(((codes - zero.T[group]) * scale[group]).T.copy())


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "int4-g32": ({"quantization_bits": 4, "group_size": 32}, 1),
    "int4-channel": ({"quantization_bits": 4, "group_size": -1}, 1),
    "int8-g32": ({"quantization_bits": 8, "quantization_type": "weight_only", "group_size": 32}, 1),
    "int4-g32-v2": ({"quantization_bits": 4, "group_size": 32}, 2),
    "int4-g16-asym": ({"quantization_bits": 4, "group_size": 16, "symmetric": False}, 2),
    "int8-channel-asym": ({"quantization_bits": 8, "quantization_type": "weight_only", "symmetric": False}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_read_back_exactly(case: str, tmp_path: Path) -> None:
    fields, version = CASES[case]
    model = quantize_model_ptq(build("llama"), progress=False, **fields)
    asked = version if case.endswith("v2") else None
    export_model(model, "gptq", tmp_path / "x", gptq_version=asked, progress=False)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    names = {name.rpartition(".")[0] for name in stored if name.endswith("qweight")}
    assert len(names) == 14
    bits = fields["quantization_bits"]
    for name in names:
        layer = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        expected = model.get_submodule(name).dequantize().double()
        assert torch.equal(unpacked(layer, bits, version=version), expected), name
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "x" / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == {1: "gptq", 2: "gptq_v2"}[version]
    assert (config["bits"], config["sym"]) == (bits, fields.get("symmetric", True))
    assert config["desc_act"] is False


def test_layers_in_float_are_named(tmp_path: Path) -> None:
    model = quantize_model_ptq(
        build("llama"), quantization_bits=4, group_size=32, skip_modules=["layers.1.mlp"], progress=False
    )
    export_model(model, "gptq", tmp_path / "x", progress=False)
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.1\.mlp\.up_proj$" in config["dynamic"]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "activations": ({"quantization_bits": 8}, {}, "no place for INT8 activations; export to compressed-tensors"),
    "mixed": ({"quantization_bits": 4, "overrides": {"o_proj": {"group_size": 32}}}, {}, "holds one scheme"),
    "version-1-zero": (
        {"quantization_bits": 4, "group_size": 32, "symmetric": False},
        {"gptq_version": 1},
        "version=2",
    ),
    "version-3": ({"quantization_bits": 4}, {"gptq_version": 3}, "expected 1 or 2"),
    "vllm": ({"quantization_bits": 4, "symmetric": False, "group_size": 32}, {"engine": "vllm"}, "symmetric=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused(case: str, tmp_path: Path) -> None:
    fields, options, message = REFUSED[case]
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.abs_()  # its zero points are at the lowest code
    quantize_model_ptq(model, progress=False, **fields)
    with pytest.raises(ConfigError, match=message):
        export_model(model, "gptq", tmp_path / "x", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_odd_shapes_and_small_scales_are_refused(tmp_path: Path) -> None:
    odd = quantize_model_ptq(build("llama-odd"), quantization_bits=4, progress=False)
    with pytest.raises(SchemeError, match="no multiple of that; export to compressed-tensors"):
        export_model(odd, "gptq", tmp_path / "x", progress=False)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
    quantize_model_ptq(model, quantization_bits=4, progress=False)
    with pytest.raises(SchemeError, match=r"up_proj\.weight: .* in float16; export to compressed-tensors"):
        export_model(model, "gptq", tmp_path / "x", progress=False)

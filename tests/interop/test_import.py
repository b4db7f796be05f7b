"""compressed-tensors and GPTQ checkpoints become hfquant's, with the same codes; foreign ones too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant import (
    ConfigError,
    FormatError,
    SchemeError,
    dequantize_model,
    export_model,
    get_quantization_info,
    import_model,
    quantize_model_ptq,
    verify_checkpoint,
)
from tests.support.checkpoints import edit_config, edit_tensors
from tests.support.tiny_models import build, output, text_inputs


# Bit for bit against engines that multiply in float: the claim of the reference kernels.
pytestmark = pytest.mark.usefixtures("reference_kernels")

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "w4a16": ({"quantization_bits": 4, "group_size": 32}, "compressed-tensors"),
    "w4a16-asym": ({"quantization_bits": 4, "group_size": 32, "symmetric": False}, "compressed-tensors"),
    "w8a16": ({"quantization_bits": 8, "quantization_type": "weight_only"}, "compressed-tensors"),
    "w8a8-dynamic": ({"quantization_bits": 8}, "compressed-tensors"),
    "w8a8-symmetric": ({"quantization_bits": 8, "activation_symmetric": True}, "compressed-tensors"),
    "w8a8-static": ({"quantization_type": "static", "calibration_data": [text_inputs()]}, "compressed-tensors"),
    "w4a8": ({"quantization_bits": 4, "quantization_type": "dynamic"}, "compressed-tensors"),
    "mixed": ({"quantization_bits": 4, "overrides": {"o_proj": {"quantization_bits": 8}}}, "compressed-tensors"),
    "gptq": ({"quantization_bits": 4, "group_size": 32}, "gptq"),
    "gptq-asym": ({"quantization_bits": 4, "group_size": 32, "symmetric": False}, "gptq"),
    "gptq-int8": ({"quantization_bits": 8, "quantization_type": "weight_only"}, "gptq"),
}


@pytest.mark.parametrize(
    ("case", "name"), [*((case, "llama") for case in CASES), ("w8a8-static", "llama-tied"), ("gptq", "llama-tied")]
)
def test_there_and_back_is_the_same_model(case: str, name: str, tmp_path: Path) -> None:
    fields, file_format = CASES[case]
    model = quantize_model_ptq(build(name), progress=False, embedding_bits=16, **fields)
    export_model(model, file_format, tmp_path / "there", max_shard_size="30KB", progress=False)
    report = import_model(tmp_path / "there", tmp_path / "back", progress=False)
    assert report.largest_rounding == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(output(again, name), output(model, name))
    assert verify_checkpoint(tmp_path / "back", progress=False).problems == ()
    schemes = [{q.name: q.scheme for q in get_quantization_info(m).quantized} for m in (model, again)]
    assert schemes[0] == schemes[1]
    assert torch.equal(output(dequantize_model(again), name), output(dequantize_model(model), name))


def test_a_checkpoint_that_compressed_tensors_itself_wrote(tmp_path: Path) -> None:
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    del compressed_tensors
    model = build("llama").bfloat16()
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = 32
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(-1, (-1, 32))
            module.weight_scale.data.copy_(groups.abs().amax(-1) / 7.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "ct")
    compressor.update_config(str(tmp_path / "ct"))
    report = import_model(tmp_path / "ct", tmp_path / "native", progress=False)
    assert set(report.schemes.values()) == {"int4-g32"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    assert torch.equal(output(again, "llama"), output(plain, "llama"))


def exported(folder: Path, file_format: str = "compressed-tensors") -> Path:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, group_size=32, progress=False)
    export_model(model, file_format, folder / "x", progress=False)
    return folder / "x"


Q = "model.layers.0.self_attn.q_proj"


def test_scales_of_other_dtypes_are_rounded_only_if_allowed(tmp_path: Path) -> None:
    folder = exported(tmp_path, "gptq")
    edit_tensors(folder, lambda t: t[f"{Q}.scales"].mul_(1.003))
    with pytest.raises(SchemeError, match=rf"{Q} .*bfloat16.*round_scales=True"):
        import_model(folder, tmp_path / "y", progress=False)
    report = import_model(folder, tmp_path / "y", round_scales=True, progress=False)
    assert 0 < report.largest_rounding < 2**-8


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "missing-scale": ("compressed-tensors", lambda t: t.pop(f"{Q}.weight_scale"), "weight_scale|groups"),
    "missing-norm": ("compressed-tensors", lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "missing-layer": ("gptq", lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)], f"{Q}.weight is missing"),
    "nan": ("gptq", lambda t: t[f"{Q}.scales"].view(-1)[:1].fill_(float("nan")), "not finite"),
    "shape": ("gptq", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1].clone()}), "qweight: expected"),
    "order": ("gptq", lambda t: t[f"{Q}.g_idx"].copy_(t[f"{Q}.g_idx"].flip(0)), "desc_act"),
    "zeros": ("gptq", lambda t: t[f"{Q}.qzeros"].zero_(), "has zero points"),
    "dtype": (
        "compressed-tensors",
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"].float()}),
        "expected torch.int32",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(case: str, tmp_path: Path) -> None:
    file_format, change, message = DAMAGE[case]
    folder = exported(tmp_path, file_format)
    edit_tensors(folder, change)
    with pytest.raises((FormatError, SchemeError), match=message):
        import_model(folder, tmp_path / "y", progress=False)
    assert not (tmp_path / "y").exists()


CONFIGS: dict[str, tuple[Any, str]] = {
    "method": ({"quant_method": "awq"}, "quant_method='awq'"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, "key-value cache"),
    "status": ({"quantization_status": "frozen"}, "expected 'compressed'"),
    "groups": ({"config_groups": None}, "cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_configs_are_refused(case: str, tmp_path: Path) -> None:
    fields, message = CONFIGS[case]
    folder = exported(tmp_path)
    edit_config(folder, lambda c: c["quantization_config"].update(fields))
    with pytest.raises((ConfigError, FormatError), match=message):
        import_model(folder, tmp_path / "y", progress=False)


def test_from_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hfquant.cli.main import app

    words = ["import", str(exported(tmp_path)), "-o", str(tmp_path / "native"), "--json"]
    result = CliRunner().invoke(app, words)
    assert json.loads(result.stdout)["schemes"] == ["int4-g32"]

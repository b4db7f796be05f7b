"""``save_quantized`` and ``load_quantized``: the same format for models that are not Transformers'."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant import ConfigError, FormatError, dequantize_model, load_quantized, quantize_model_ptq, save_quantized
from tests.support.checkpoints import edit_bytes, edit_config, edit_header, edit_tensors, set_scale
from tests.support.tolerance import assert_close


class Tagger(nn.Module):
    """A tied table, a norm, a buffer, a convolution and linears of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 36)
        self.convolution = nn.Conv1d(36, 36, 3, padding=1)
        self.norm = nn.LayerNorm(36)
        self.hidden = nn.Sequential(nn.Linear(36, 50), nn.GELU(), nn.Linear(50, 36))
        self.head = nn.Linear(36, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("step", torch.tensor(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.convolution(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x + self.hidden(x)))


IDS = torch.arange(12).view(2, 6)

SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"quantization_bits": 4},
    "int4-asymmetric": {"quantization_bits": 4, "symmetric": False, "embedding_bits": 4},
    "int8-dynamic": {"quantization_bits": 8},
    "int8-static": {"quantization_type": "static", "calibration_data": [IDS]},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_is_the_same(scheme: str, tmp_path: Path) -> None:
    model = Tagger().eval()
    before = model(IDS)
    quantize_model_ptq(model, progress=False, **SCHEMES[scheme])
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(Tagger(), tmp_path / "model").eval()
    with torch.no_grad():
        expected = model(IDS)
        assert torch.equal(loaded(IDS), expected)
        assert not torch.equal(expected, before)
    assert loaded.head.weight is loaded.table.weight
    assert loaded.head.weight_scale is loaded.table.weight_scale
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    save_quantized(loaded, tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again")]
    assert configs[0] == configs[1]
    floats = dequantize_model(loaded)
    assert {name: type(m) for name, m in floats.named_modules()} == {
        name: type(m) for name, m in Tagger().named_modules()
    }
    if scheme.startswith("int4"):
        with torch.no_grad():
            # Not bit for bit: torch adds up a linear layer of a strided input in another order if its weight can train.
            assert_close(floats(IDS), copy.deepcopy(floats).double()(IDS), expected)


def test_a_skeleton_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = quantize_model_ptq(Tagger().eval(), quantization_bits=4, progress=False)
    save_quantized(model, tmp_path / "model")
    with torch.device("meta"):
        skeleton = Tagger()
    loaded = load_quantized(skeleton, tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))


DAMAGE: dict[str, tuple[Any, str]] = {
    "bits": (
        lambda f: edit_config(f, lambda c: c["quantization_config"].update(quantization_bits=5)),
        "quantization_bits",
    ),
    "version": (lambda f: edit_config(f, lambda c: c["quantization_config"].update(format_version=9)), "version 9"),
    "modules": (lambda f: edit_config(f, lambda c: c["quantization_config"].pop("modules")), "modules=None"),
    "unknown-module": (
        lambda f: edit_config(f, lambda c: c["quantization_config"]["modules"].update(x="int4-g16")),
        "'x'",
    ),
    "scheme": (
        lambda f: edit_config(f, lambda c: c["quantization_config"]["modules"].update({"hidden.0": "int5"})),
        "hidden.0.*int5",
    ),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config-not-json": (lambda f: edit_bytes(f, lambda b: b[:20], name="config.json"), "config.json"),
    "save-id": (lambda f: edit_header(f, lambda h: h["__metadata__"].update(hfquant_save_id="0")), "another save"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop("norm.weight")), "norm.weight is missing"),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update(more=torch.zeros(1))), "more"),
    "scale-nan": (lambda f: edit_tensors(f, lambda t: set_scale(t, "hidden.0.weight_scale", float("nan"))), "hidden.0"),
    "norm-nan": (lambda f: edit_tensors(f, lambda t: t["norm.weight"].fill_(float("nan"))), "norm.weight"),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({"hidden.0.bias": torch.zeros(3)})), "hidden.0.bias.*50"),
    "dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({"hidden.0.weight": t["hidden.0.weight"].long()})),
        "hidden.0.weight.*I32.*I64",
    ),
    "truncated": (lambda f: edit_bytes(f, lambda b: b[:-9]), "truncated"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    save_quantized(quantize_model_ptq(Tagger(), quantization_bits=4, progress=False), tmp_path / "model")
    load_quantized(Tagger(), tmp_path / "model")
    damage, message = DAMAGE[name]
    damage(tmp_path / "model")
    with pytest.raises((FormatError, ConfigError), match=message):
        load_quantized(Tagger(), tmp_path / "model")


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        save_quantized(Tagger(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_torchs_encoder_layer_keeps_what_it_reads_itself() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 32)).eval()
    quantize_model_ptq(model, quantization_bits=8, progress=False)
    assert type(model[0].linear1) is nn.Linear
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(2, 5, 32))).all()

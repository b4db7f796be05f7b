"""Preparing a model: what stays, what is added, what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from hfquant import ConfigError, convert_model_qat, prepare_model_qat, quantize_model_ptq
from hfquant.errors import CalibrationError, SchemeError
from hfquant.hf import qat
from hfquant.hf.qat import converted_model
from hfquant.nn.swap import packed_modules
from hfquant.numerics.affine import scale_from_bits
from hfquant.qat.prepare import bypassed, fake_quant_modules, set_blend
from hfquant.qat.schedule import blend_at
from tests.support.tiny_models import TINY, build, output, text_inputs


# What was trained is what is deployed, bit for bit, on the reference kernels.
pytestmark = pytest.mark.usefixtures("reference_kernels")


def prepared(name: str = "llama-tied", **options: object) -> nn.Module:
    return prepare_model_qat(build(name), **{"quantization_bits": 4, "progress": False} | options)


def test_parameters_keep_names_identity_and_ties() -> None:
    model = build("llama-tied")
    before = {name: id(p) for name, p in model.named_parameters()}
    prepare_model_qat(model, quantization_bits=4, progress=False)
    after = {name: id(p) for name, p in model.named_parameters()}
    assert before.items() <= after.items()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_log_scale is model.model.embed_tokens.weight_log_scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_before_training_it_is_ptq(name: str, bits: int) -> None:
    trains, ptq = prepared(name, quantization_bits=bits), build(name)
    quantize_model_ptq(ptq, quantization_bits=bits, progress=False)
    assert torch.equal(output(trains, name), output(ptq, name))


@pytest.mark.parametrize("kind", ["weight_only", "dynamic"])
@pytest.mark.parametrize("algorithm", ["gptq", "signround", "awq"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_before_training_it_is_calibrated_ptq(name: str, algorithm: str, kind: str) -> None:
    batches = [TINY[name].inputs(), {key: value.flip(0, -1) for key, value in TINY[name].inputs().items()}]
    options = {"algorithm": algorithm, "quantization_type": kind, "calibration_data": batches, "quantization_bits": 4}
    options |= {"iterations": 5} if algorithm == "signround" else {}
    before = dict(build(name).named_parameters())
    trains, ptq = prepared(name, **options), quantize_model_ptq(build(name), progress=False, **options)
    moved = [n for n, p in trains.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert moved
    assert torch.equal(output(trains, name), output(ptq, name))
    convert_model_qat(trains)
    codes, expected = trains.state_dict(), ptq.state_dict()
    assert codes.keys() == expected.keys()
    assert not [key for key in codes if not torch.equal(codes[key], expected[key])]


def test_a_calibrated_start_takes_texts_and_leaves_schemes_alone() -> None:
    options = {"quantization_bits": 8, "quantization_type": "static", "algorithm": "gptq"}
    model = prepared("llama", calibration_data=text_inputs()["input_ids"].tolist(), **options)
    assert all(m.scheme.quantization_type == "static" for _, m in fake_quant_modules(model) if m.scheme.activation)
    assert all(torch.isfinite(m.input_scale("weight")) for _, m in fake_quant_modules(model) if m.scheme.activation)


def test_static_ranges_start_near_those_of_ptq() -> None:
    """PTQ observes on quantized activations, block by block; training starts from float ones, seen in one pass."""
    options = {"quantization_bits": 8, "quantization_type": "static", "calibration_data": [text_inputs()]}
    trains, ptq = prepared("llama", **options), build("llama")
    quantize_model_ptq(ptq, progress=False, algorithm="search", smoothquant=False, **options)
    ours = {name: m.input_scale("weight") for name, m in fake_quant_modules(trains) if m.scheme.activation}
    theirs = {name: scale_from_bits(m.input_scale) for name, m in packed_modules(ptq) if m.scheme.activation}
    assert ours.keys() == theirs.keys()
    for name, scale in ours.items():
        assert 0.8 < float(scale / theirs[name]) < 1.25, name


def test_gradients_of_a_tied_table_are_summed() -> None:
    model = prepared()
    ids = text_inputs()["input_ids"]
    embedded = model.model.embed_tokens(ids)
    hidden = torch.randn(3, 64)
    embedded.sum().backward()
    first = model.lm_head.weight.grad.clone()
    model.lm_head(hidden).sum().backward()
    second = model.lm_head.weight.grad - first
    assert first.any()
    assert second.any()


def test_casting_keeps_the_precision_of_what_trains() -> None:
    model = prepared("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    for name, module in fake_quant_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            assert torch.equal(parameter, before[f"{name}.{key}"])
    assert model.model.norm.weight.dtype == torch.bfloat16
    out = output(model, "llama")
    assert out.dtype == torch.bfloat16
    assert torch.equal(output(convert_model_qat(model), "llama"), out)


def test_a_copy_trains_apart() -> None:
    model = prepared("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert not torch.equal(output(other, "llama"), output(model, "llama"))
    assert convert_model_qat(other) is other


def test_bypassed_it_is_the_float_model() -> None:
    model, plain = prepared("llama", variant="lora"), build("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    with bypassed(model):
        assert torch.equal(output(model, "llama"), output(plain, "llama"))
    assert not torch.equal(output(model, "llama"), output(plain, "llama"))


def test_lora_trains_adapters_and_scales_only() -> None:
    model = prepared("llama", variant="lora", adapter_rank=4, adapter_alpha=8)
    trains = {name.rpartition("weight_")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"lora_A", "lora_B", "log_scale"}
    assert model.model.layers[0].mlp.up_proj.lora_factor == 2
    assert model.model.layers[0].mlp.up_proj.weight_lora_A.shape == (4, 64)
    assert not hasattr(model.lm_head, "weight_lora_A")


def test_blend_is_a_function_of_the_step() -> None:
    assert [blend_at(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert blend_at(0, 0) == 1
    model, plain = prepared("llama"), build("llama")
    set_blend(model, 0.0)
    torch.testing.assert_close(output(model, "llama"), output(plain, "llama"))
    set_blend(model, 0.5)
    with pytest.raises(ConfigError, match="50 % quantization"):
        convert_model_qat(model)
    set_blend(model, 1.0)
    convert_model_qat(model)


def test_experts_that_saw_no_token_have_zero_gradients_and_the_layer_range() -> None:
    options = {"quantization_type": "static", "calibration_data": [TINY["mixtral"].inputs()]}
    model = prepared("mixtral", **options)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(3, 64)
    experts(hidden, torch.tensor([[0, 2]] * 3), torch.full((3, 2), 0.5)).sum().backward()
    assert not experts.down_proj.grad[1].any()
    assert experts.down_proj.grad[0].any()
    assert experts.down_proj_input_log_scale.shape == (1,)
    assert torch.isfinite(experts.input_scale("down_proj")).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "half"}, ConfigError, "qat_variant='half'.*'full', 'lora'"),
        ({"variant": "lora", "adapter_rank": 0}, ConfigError, "adapter_rank=0"),
        ({"quantization_type": "static"}, CalibrationError, "needs calibration_data"),
        ({"quantization_type": "static", "calibration_data": []}, CalibrationError, "empty"),
        ({"algorithm": "gptq"}, CalibrationError, "algorithm='gptq' needs calibration_data"),
        ({"group_size": 48}, SchemeError, "48"),
    ],
)
def test_misuse_is_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepared("llama", **options)


def test_a_model_in_which_nothing_would_train_is_refused() -> None:
    model = build("llama").requires_grad_(False)
    prepare_model_qat(model, quantization_bits=4, progress=False)  # its scales train
    with pytest.raises(ConfigError, match="prepared .* already"):
        prepare_model_qat(model, quantization_bits=4)
    with pytest.raises(ConfigError, match="quantized by hfquant already"):
        prepare_model_qat(quantize_model_ptq(build("llama"), progress=False))
    with pytest.raises(ConfigError, match="not prepared"):
        convert_model_qat(build("llama"))


def test_a_diverged_model_is_not_saved() -> None:
    model = prepared("llama")
    with torch.no_grad():
        model.lm_head.weight_log_scale[3, 0] = float("nan")
    with pytest.raises(SchemeError, match=r"lm_head\.weight_log_scale is NaN"):
        convert_model_qat(model)


def test_saving_a_model_in_training_says_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(qat.logger, "warning_once", said.append)
    model = prepared("llama")
    model.save_pretrained(tmp_path / "training")
    assert "quantization-aware training" in said.pop()
    with converted_model(model):
        model.save_pretrained(tmp_path / "now")
    convert_model_qat(model).save_pretrained(tmp_path / "end")
    build("llama").save_pretrained(tmp_path / "float")
    assert not said

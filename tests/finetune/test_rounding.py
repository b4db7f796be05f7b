"""Delayed quantization: training without rounding, and putting the weights onto the grid anew by calibration."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant import (
    CalibrationError,
    ConfigError,
    dequantize_model,
    export_model,
    merge_adapters,
    prepare_model_for_finetuning,
    quantize_model_ptq,
    save_quantized,
)
from hfquant.finetune.adapted import adapted_modules, movement
from hfquant.hf.rounding import is_rounded, round_anew, set_rounding
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.swap import packed_modules
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.metrics import sqnr_db
from hfquant.numerics.packing import unpack
from tests.support.finetune import SCHEMES, packed_model, train_
from tests.support.tiny_models import build, output


pytestmark = pytest.mark.usefixtures("reference_kernels")

FIELDS: dict[str, dict[str, Any]] = {
    "int4-g32": {"quantization_bits": 4, "group_size": 32},
    "int4-asymmetric": {"quantization_bits": 4, "symmetric": False, "group_size": 16},
    "int4-channel": {"quantization_bits": 4, "group_size": -1},
    "int8": {"quantization_bits": 8, "quantization_type": "weight_only"},
    "int8-g32": {"quantization_bits": 8, "quantization_type": "weight_only", "group_size": 32},
    "int8-dynamic": {"quantization_bits": 8, "quantization_type": "dynamic"},
}


def batches(count: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 128, (2, 16), generator=generator)} for _ in range(count)]


def trained(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """``model`` after a few steps without rounding."""
    prepare_model_for_finetuning(model, rank=4, progress=False)
    set_rounding(model, False)
    train_(model, name, steps=3)
    return model.eval()


def dense(module: Any, name: str) -> Tensor:
    """``scale * (code + residual / 16 + alpha / rank * B @ A / initial_scale - zero_point)``, in plain torch."""
    packed, length = PackedModule.packed(module, name), module.float_weights[name].in_features
    bits, initial = module.scheme.weight.bits, scale_from_bits(packed.weight_scale)
    size = length // initial.shape[-1]
    steps = unpack(packed.weight, bits=bits, length=length).float()
    steps = steps + unpack(module.beside(name, "residual"), bits=4, length=length) / 16
    product = (module.beside(name, "lora_B") * module.lora_factor) @ module.beside(name, "lora_A")
    steps = steps + product / initial.repeat_interleave(size, -1)
    if packed.weight_zero_point is not None:
        zero = unpack(packed.weight_zero_point, bits=bits, length=initial.shape[-1])
        steps = steps - zero.repeat_interleave(size, -1)
    return steps * initial.repeat_interleave(size, -1)


@torch.no_grad()
def float_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The float model with the weights that ``model`` trains."""
    made = build(name)
    for key, module in adapted_modules(model):
        for parameter, weight in module.float_weights.items():
            values = weight.from_rows(dense(module, parameter))
            made.get_submodule(key)._parameters[parameter].copy_(values)
    return made


def grids(model: nn.Module) -> dict[str, Tensor]:
    """Codes, scales, zero points and residuals of every packed module, by name."""
    found = {}
    for name, module in packed_modules(model):
        for key in module.float_weights:
            found |= {f"{name}.{part}": tensor for part, tensor in module.packed_parameters(key)}
            found[f"{name}.{key} residual"] = module.beside(key, "residual")
    return found


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [*((scheme, "gptq") for scheme in FIELDS), ("int4-asymmetric", "signround"), ("int8-dynamic", "signround")],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_rounding_anew_is_ptq_of_the_float_model(name: str, scheme: str, algorithm: str) -> None:
    fields = FIELDS[scheme] | {"embedding_bits": 16, "keep_residual": True}
    model = trained(quantize_model_ptq(build(name), progress=False, **fields), name)
    expected = float_model(model, name)
    if "dynamic" not in scheme:
        assert torch.allclose(output(model, name), output(expected, name), rtol=1e-4, atol=1e-4)
    parameters = {key: id(p) for key, p in model.named_parameters()}
    how = {"algorithm": algorithm, "progress": False}
    round_anew(model, batches(), iterations=4, **how)
    quantize_model_ptq(expected, calibration_data=batches(), iterations=4, smoothquant=False, **fields | how)
    assert {key: id(p) for key, p in model.named_parameters()} == parameters
    ours, theirs = grids(model), grids(expected)
    assert ours.keys() == theirs.keys()
    assert sum(int((tensor != theirs[key]).sum()) for key, tensor in ours.items()) == 0
    assert torch.equal(output(model, name), output(expected, name))
    for _, module in adapted_modules(model):
        assert type(module).__name__.startswith("Adapted")
        for key in module.float_weights:
            assert not bool(module.beside(key, "lora_B").any() or module.beside(key, "log_scale").any())
            assert bool(module.beside(key, "lora_A").any())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "llama4"])
def test_training_goes_on_in_the_grid_and_merging_changes_nothing(name: str, scheme: str, tmp_path: Path) -> None:
    model = trained(packed_model(name, scheme), name)
    schemes = {key: str(module.scheme) for key, module in packed_modules(model)}
    inputs = {key: p.clone() for key, p in model.named_parameters() if key.endswith(("input_scale", "input_log_scale"))}
    others = {key: p.clone() for key, p in model.named_parameters() if "_proj" not in key and "c_" not in key}
    before = output(model, name)
    round_anew(model, batches(), progress=False)
    assert is_rounded(model)
    assert {key: str(module.scheme) for key, module in packed_modules(model)} == schemes
    assert all(torch.equal(model.get_parameter(key), p) for key, p in (inputs | others).items())
    assert ("static" in scheme) == bool(inputs)
    assert all(p.requires_grad for _, m in adapted_modules(model) for p in m.trained().values())
    assert movement(model).codes_moved == 0
    error = (output(model, name) - before).square().mean() / before.square().mean()
    assert float(error) < (0.01 if "int8" in scheme else 0.5)
    train_(model, name)
    model.eval()
    assert movement(model).codes_moved > 0
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    merge_adapters(model)
    assert torch.equal(output(model, name), expected)
    assert torch.equal(output(type(model).from_pretrained(tmp_path), name), expected)
    assert any("residual" in key for key, _ in model.named_parameters()) == ("residual" in scheme)


def test_static_layers_that_no_batch_reaches_keep_their_scales() -> None:
    """Also where PTQ would take other activations: a layer of training has the scheme that it has."""
    model = trained(packed_model("mixtral", "int8-static"), "mixtral")
    before = {key: p.clone() for key, p in model.named_parameters() if key.endswith("input_scale")}
    round_anew(model, [{"input_ids": torch.tensor([[3]])}], progress=False)
    assert all(torch.equal(model.get_parameter(key), p) for key, p in before.items())


def test_plain_modules_and_parts_of_models() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    x = [torch.randn(8, 64) for _ in range(4)]
    for fields in ({"quantization_bits": 4}, {"quantization_bits": 8, "quantization_type": "weight_only"}):
        model = quantize_model_ptq(copy.deepcopy(plain), group_size=16, progress=False, **fields)
        prepare_model_for_finetuning(model, rank=2, progress=False)
        set_rounding(model, False)
        expected = model(x[0]).detach()
        round_anew(model, x, progress=False)
        assert is_rounded(model)
        assert sqnr_db(expected, model(x[0]).detach()) > (35 if fields["quantization_bits"] == 8 else 12)
    part = packed_model("llama")
    codes = part.model.layers[0].mlp.up_proj.weight.clone()
    prepare_model_for_finetuning(part, rank=2, target_modules=["layers.1.self_attn.q_proj"], progress=False)
    round_anew(part, batches(), progress=False)
    assert torch.equal(part.model.layers[0].mlp.up_proj.weight, codes)


def test_one_block_is_float_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(packed_model("llama"), "llama")
    floats: list[int] = []
    from hfquant.ptq import recalibrated

    quantize = recalibrated.Calibration.quantize_layers_

    def counting(self: Any, *arguments: Any) -> None:
        floats.append(sum(type(module) is nn.Linear for module in model.modules()))
        quantize(self, *arguments)

    monkeypatch.setattr(recalibrated.Calibration, "quantize_layers_", counting)
    round_anew(model, batches(), progress=False)
    assert floats == [7, 7]
    assert not any(type(module) is nn.Linear for module in model.modules())


def test_what_goes_wrong_leaves_the_model_in_training() -> None:
    model = trained(packed_model("llama"), "llama")
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises(CalibrationError, match="empty"):
        round_anew(model, [], progress=False)
    model.model.embed_tokens.weight_scale.data.fill_(0x7FC0)  # NaN
    with pytest.raises(CalibrationError, match="NaN"):
        round_anew(model, batches(), progress=False)
    assert not is_rounded(model)
    assert all(torch.equal(model.get_parameter(key), p) for key, p in before.items() if "embed" not in key)
    assert len(list(adapted_modules(model))) == 14
    assert all(module.input_observer is None for _, module in adapted_modules(model))
    assert all(p.requires_grad for _, m in adapted_modules(model) for p in m.trained().values())


def test_learned_rounding_leaves_no_gradients() -> None:
    model = packed_model("llama")
    prepare_model_for_finetuning(model, rank=4, modules_to_save=["input_layernorm"], progress=False)
    set_rounding(model, False)
    round_anew(model, batches(), algorithm="signround", iterations=2, progress=False)
    assert all(p.grad is None for p in model.parameters())
    assert model.model.layers[0].input_layernorm.weight.requires_grad


def test_the_optimizer_forgets_what_starts_anew() -> None:
    model = packed_model("llama", "int8-static")
    prepare_model_for_finetuning(model, rank=4, modules_to_save=["model.norm"], progress=False)
    set_rounding(model, False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batches()[0]).logits.square().mean().backward()
    optimizer.step()
    assert all(not bool(m.weight_log_scale.grad.any()) for _, m in adapted_modules(model))
    round_anew(model, batches(), optimizer=optimizer, progress=False)
    kept = {key for key, p in model.named_parameters() if p in optimizer.state}
    assert kept == {
        "model.norm.weight",
        *(f"{name}.input_log_scale" for name, _ in adapted_modules(model)),
    }
    optimizer.zero_grad()
    model(**batches()[0]).logits.square().mean().backward()
    optimizer.step()


def test_the_algorithm_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfquant.hf import rounding

    seen: list[tuple[str, int]] = []

    class Watched:
        def __init__(self, model: Any, layers: Any, data: Any, options: Any) -> None:
            seen.append((options.algorithm, options.iterations))

        def run_(self) -> None:
            pass

    monkeypatch.setattr(rounding, "Recalibration", Watched)
    for fields in ({"algorithm": "rtn"}, {"algorithm": "signround", "iterations": 3}, {"algorithm": "awq"}):
        data = None if fields["algorithm"] == "rtn" else batches(2)
        model = quantize_model_ptq(build("llama"), quantization_bits=4, calibration_data=data, progress=False, **fields)
        prepare_model_for_finetuning(model, rank=2, progress=False)
        round_anew(model, batches(2))
        round_anew(model, batches(2), algorithm="signround", iterations=7)
    assert seen[::2] == [("gptq", 200), ("signround", 3), ("gptq", 200)]
    assert seen[1::2] == [("signround", 7)] * 3


def test_a_model_that_is_not_rounded_is_not_saved(tmp_path: Path) -> None:
    model = trained(packed_model("llama"), "llama")
    for refused in (
        lambda: model.save_pretrained(tmp_path),
        lambda: save_quantized(model, tmp_path / "plain"),
        lambda: merge_adapters(model),
        lambda: dequantize_model(model),
        lambda: export_model(model, "dense", tmp_path / "export"),
    ):
        with pytest.raises(ConfigError, match="not rounded yet"):
            refused()
    assert len(list(adapted_modules(model))) == 14
    set_rounding(model, True)
    model.save_pretrained(tmp_path)


def test_misuse_is_refused() -> None:
    model = packed_model("llama")
    with pytest.raises(ConfigError, match="not in fine-tuning; only adapter='grid'"):
        set_rounding(model, False)
    prepare_model_for_finetuning(model, "scales", progress=False)
    for call in (lambda: set_rounding(model, False), lambda: round_anew(model, batches())):
        with pytest.raises(ConfigError, match="prepared with adapter='scales'"):
            call()
    other = packed_model("llama")
    prepare_model_for_finetuning(other, rank=2, progress=False)
    for options, message in (
        ({"algorithm": "awq"}, "algorithm='awq': expected one of 'gptq', 'signround'"),
        ({"iterations": 0}, "iterations=0: expected an integer from 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            round_anew(other, batches(), **options)


def test_a_compiled_model_and_autocast_train_without_rounding() -> None:
    losses = []
    for compiled in (False, True):
        model = packed_model("llama").train()
        prepare_model_for_finetuning(model, rank=4, progress=False)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        found = []
        for step in range(4):
            if step in (0, 2):
                set_rounding(model, step == 2)
            loss = run(input_ids=torch.arange(3, 19).unsqueeze(0)).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    assert torch.equal(*losses)
    set_rounding(model, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.arange(3, 19).unsqueeze(0)).logits.float().square().mean().backward()
    assert all(bool(m.weight_lora_A.grad.isfinite().all()) for _, m in adapted_modules(model))

"""Static activations of the layers that disturb their block most become dynamic, up to a twentieth of the model."""

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfquant import get_quantization_info, quantize_model_ptq
from hfquant.hf.info import activation_shares
from hfquant.nn.select import Selection
from hfquant.numerics.affine import choose_row_scale, fake_quantize
from hfquant.numerics.observers import choose_input_scale
from hfquant.ptq.calibrated import CalibrationOptions, calibrate_
from hfquant.ptq.fallback import Noise, block_noise, worst_layers
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.schemes import LayerScheme


STATIC, DYNAMIC = LayerScheme.parse("int8-channel-static"), LayerScheme.parse("int8-channel-dynamic")


class Block(nn.Module):
    """Two layers that read the same tensor, one that reads another, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.left(x) * self.right(x))


def statistics_of(x: Tensor) -> InputStatistics:
    found = InputStatistics.empty(x.shape[-1], x.device)
    found.add(x.reshape(-1, x.shape[-1]), held=False, sample_rows=10**6)
    return found


def test_noise_is_measured_where_the_block_ends_for_all_readers_of_a_tensor_at_once() -> None:
    torch.manual_seed(0)
    block, inputs = Block(), [torch.randn(1, 300, 8) for _ in range(3)]
    mask = torch.arange(300).expand(1, -1) < 200
    seen = torch.cat(inputs, 1)
    shared = statistics_of(seen)
    last = statistics_of(block.left(seen) * block.right(seen))
    modules = dict(block.named_children())
    found = {
        WeightKey("left", "weight"): shared,
        WeightKey("right", "weight"): shared,
        WeightKey("last", "weight"): last,
    }
    with torch.no_grad():
        measured = block_noise(
            [lambda x=x: block(x) for x in inputs],
            [None, None, mask],
            modules,
            dict.fromkeys(modules, STATIC),
            found,
            "minmax",
        )
    used = torch.cat((inputs[2][mask], inputs[1][0])).unsqueeze(0)  # from the last on, until there are 512
    assert [noise.layers for noise in measured] == [("left", "right"), ("last",)]
    for kind in ("static", "dynamic"):
        with torch.no_grad():
            scale = choose_input_scale(shared.sample, shared.absmax.amax(), "minmax")
            coarse = fake_quantize(used, scale if kind == "static" else choose_row_scale(used), bits=8)
            middle = linear(coarse, block.left.weight) * linear(coarse, block.right.weight)
            expected = used + linear(middle, block.last.weight)
            clean = block(used)
            share = ((expected - clean).square().sum(-1) / clean.square().sum(-1)).mean()
        assert getattr(measured[0], kind) == pytest.approx(float(share), rel=1e-3)
    assert all(not module._forward_pre_hooks for module in modules.values())


def test_only_static_layers_are_measured() -> None:
    block = Block()
    assert (
        block_noise(
            [], [], dict(block.named_children()), dict.fromkeys(("left", "right", "last"), DYNAMIC), {}, "minmax"
        )
        == []
    )


SIZES = {f"layer{i}": 10 for i in range(40)}
"""A twentieth are two layers."""


def entries(*gains: float) -> list[Noise]:
    return [Noise((f"layer{i}",), gain + 0.25, 0.25) for i, gain in enumerate(gains)]


@pytest.mark.parametrize(
    ("noise", "chosen"),
    [
        (entries(0.1, 0.5, 0.3), ["layer1", "layer2"]),
        (entries(0.1, 0.5, -0.1), ["layer1", "layer0"]),
        (entries(-0.1, 0.0), []),
        ([Noise(("layer0", "layer1"), 0.9, 0.1), *entries(0, 0, 0.5)], ["layer0", "layer1"]),
        ([Noise(("layer0", "layer1", "layer2"), 0.9, 0.1), *entries(0, 0, 0, 0.5)], []),
    ],
)
def test_the_worst_go_first_and_stop_where_the_share_ends(noise: list[Noise], chosen: list[str]) -> None:
    assert list(worst_layers(noise, SIZES, dict.fromkeys(SIZES, STATIC))) == chosen


def test_layers_that_are_dynamic_already_count() -> None:
    schemes = dict.fromkeys(SIZES, STATIC) | {"layer7": DYNAMIC}
    assert list(worst_layers(entries(0.1, 0.5, 0.3), SIZES, schemes)) == ["layer1"]


def model_with_outliers() -> LlamaForCausalLM:
    """28 layers of one size; a down projection reads a few huge values that no norm can take up."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
        model.model.layers[2].mlp.up_proj.weight[3].mul_(300)
    return model


def quantized(model: LlamaForCausalLM) -> Any:
    fields = {"quantization_bits": 8, "quantization_type": "static", "smoothquant": False}
    return quantize_model_ptq(model, calibration_data=DATA, progress=False, **fields)


DATA = [{"input_ids": torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(i))} for i in range(8)]


def test_a_layer_that_hardly_counts_stays_static_whatever_its_own_noise() -> None:
    model = model_with_outliers()
    with torch.no_grad():
        weight = model.model.layers[2].mlp.down_proj.weight.mul_(1e-4)
        weight[:, 3].mul_(1e-6)  # all that it reads beside the huge values is rounded to nothing
    model = quantized(model)
    assert model.get_submodule("model.layers.2.mlp.down_proj").scheme == STATIC


def test_the_worst_layer_of_a_model_is_dynamic_named_and_saved(tmp_path: Any) -> None:
    model, name = quantized(model_with_outliers()), "model.layers.2.mlp.down_proj"
    schemes = {q.name: q.scheme for q in get_quantization_info(model).quantized}
    assert [n for n, scheme in schemes.items() if scheme == str(DYNAMIC)] == [f"{name}.weight"]
    assert activation_shares(model)["static"] == pytest.approx(27 / 28)
    (result,) = [r for r in model.hf_quantizer.results if r.name == f"{name}.weight"]
    assert result.scheme == str(DYNAMIC)
    assert re.search(r"static ones change its block's output by [\d.e-]+ %, dynamic ones by [\d.e-]+ %", result.note)
    assert model.get_submodule(name).scheme == replace(STATIC, activation=DYNAMIC.activation)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = DATA[0]["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)


class Memory:
    """A store of finished blocks that are not in files."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def load(self, part: str) -> Any:
        return copy.deepcopy(self.parts.get(part))

    def save(self, part: str, tensors: Any, record: Any) -> Any:
        self.parts[part] = copy.deepcopy((tensors, record))
        return tensors


def test_a_run_that_goes_on_falls_back_as_one_that_was_not_interrupted() -> None:
    store, found = Memory(), []
    for _ in range(2):
        model = model_with_outliers()
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        selection = Selection(dict.fromkeys(layers, STATIC), {}, {})
        options = CalibrationOptions(smoothquant=False, progress=False)
        results = calibrate_(model, selection, DATA, options, store)
        found.append((selection.schemes, results))
        store.parts.pop("model.layers.3", None)
    assert found[0] == found[1]
    assert list(found[0][0].values()).count(DYNAMIC) == 1

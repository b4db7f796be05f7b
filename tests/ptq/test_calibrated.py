"""Calibrated quantization of whole models: every architecture, every kind of data, both algorithms."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hfquant import (
    CalibrationError,
    ConfigError,
    HfQuantConfig,
    SchemeError,
    get_quantization_info,
    load_quantized,
    quantize_model_ptq,
    save_quantized,
)
from hfquant.formats.headers import canonicalize_header
from hfquant.nn.quant_linear import QuantLinear
from hfquant.numerics.affine import scale_from_bits
from hfquant.ptq.blocks import find_stacks, is_chain, record_calls
from tests.support.tiny_models import TINY, build, output, text_inputs


INT4 = {"quantization_bits": 4, "group_size": 16}


def data(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(3, 120, (2, 24))} for _ in range(count)]


def error(name: str, **fields: Any) -> float:
    before, model = output(build(name), name), build(name)
    quantize_model_ptq(model, progress=False, **fields)
    return float((output(model, name) - before).norm() / before.norm())


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_calibrated_and_every_layer_reported(name: str) -> None:
    model = build(name)
    quantize_model_ptq(model, quantization_bits=4, calibration_data=[TINY[name].inputs()] * 2, progress=False)
    assert model.config.quantization_config.algorithm == "gptq"
    assert torch.isfinite(output(model, name)).all()
    quantizer = model.hf_quantizer
    info = get_quantization_info(model)
    modules = {q.name: model.get_submodule(q.name.rpartition(".")[0]) for q in info.quantized}
    tables = {q.name for q in info.quantized if q.tied_to or isinstance(modules[q.name], nn.Embedding)}
    tied = {q.tied_to for q in info.quantized} | {q.name for q in info.quantized if q.scheme == "int8-channel"}
    reported = {result.name.partition("[")[0] for result in quantizer.results}
    assert reported == {q.name for q in info.quantized} - tables - tied
    assert all(math.isfinite(result.sqnr_db) for result in quantizer.results)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen3-moe"])
def test_gptq_is_nearer_to_the_original_than_search(name: str) -> None:
    torch.manual_seed(1)
    batches = [*data(15), text_inputs()]  # judged on the last, which is held out
    assert error(name, **INT4, calibration_data=batches) < error(name, **INT4)


@torch.no_grad()
def test_signround_is_nearer_than_gptq_on_unseen_inputs() -> None:
    found: dict[str, float] = {"signround": 0.0, "gptq": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        batches, unseen = (
            [{"input_ids": torch.randint(3, 120, (4, 48))} for _ in range(32)],
            torch.randint(3, 120, (8, 48)),
        )
        wanted = build("llama")(unseen).logits
        for algorithm in found:
            model, fields = build("llama"), INT4 | ({"iterations": 200} if algorithm == "signround" else {})
            quantize_model_ptq(model, **fields, calibration_data=batches, algorithm=algorithm, progress=False)
            found[algorithm] += float((model(unseen).logits - wanted).norm() / wanted.norm())
    assert found["signround"] < 0.98 * found["gptq"]


def test_the_result_is_deterministic_and_reloads(tmp_path: Any) -> None:
    batches, states = data(), []
    for folder in ("a", "b"):
        model = build("llama")
        quantize_model_ptq(model, **INT4, calibration_data=batches, algorithm="signround", iterations=3, progress=False)
        model.save_pretrained(tmp_path / folder)
        canonicalize_header(tmp_path / folder / "model.safetensors")  # safetensors orders metadata at random
        states.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert states[0] == states[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(output(again, "llama"), output(model, "llama"))
    record = again.config.quantization_config
    assert record.algorithm == "signround"
    assert record.calibration["tokens"] == 8 * 48
    assert len(record.calibration["sha256"]) == 64


def test_experts_without_tokens_fall_back_and_are_named() -> None:
    model = build("mixtral")
    quantize_model_ptq(model, **INT4, calibration_data=[{"input_ids": torch.full((1, 4), 5)}] * 2, progress=False)
    experts = [r for r in model.hf_quantizer.results if "[" in r.name]
    assert {r.method for r in experts if r.rows == 0} == {"search"}
    assert all("no calibration data reached it" in r.note for r in experts if r.rows == 0)
    few = [r for r in experts if 0 < r.rows < 16]
    assert few
    assert all(r.method == "weighted" and "only" in r.note for r in few)


def test_padding_is_left_out_of_the_statistics() -> None:
    ids = torch.randint(3, 120, (2, 12))
    padded = torch.cat((ids, torch.zeros(2, 12, dtype=torch.int64)), 1)
    mask = torch.cat((torch.ones_like(ids), torch.zeros_like(ids)), 1)
    plain, masked = build("llama"), build("llama")
    fields = {**INT4, "embedding_bits": 16, "progress": False}
    quantize_model_ptq(plain, calibration_data=[{"input_ids": ids}] * 8, **fields)
    quantize_model_ptq(masked, calibration_data=[{"input_ids": padded, "attention_mask": mask}] * 8, **fields)
    rows = [[r.rows for r in m.hf_quantizer.results] for m in (plain, masked)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "whisper", "t5"])
def test_blocks_are_found_and_their_calls_are_what_they_receive(name: str) -> None:
    model = build(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or hasattr(m, "nf")]
    stacks = find_stacks(model, layers)
    for stack in stacks:
        assert is_chain(model, stack, TINY[name].inputs())
        quick = record_calls(model, stack, [TINY[name].inputs()], pass_through=True)
        hidden = quick[stack[0]][0].hidden
        with torch.no_grad():
            for block in stack:
                (real,) = record_calls(model, [block], [TINY[name].inputs()], pass_through=False)[block]
                torch.testing.assert_close(real.hidden, hidden)
                hidden = quick[block][0].with_hidden(hidden).run(model.get_submodule(block))


def test_a_list_that_is_no_chain_is_calibrated_too() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0](x)
            return self.parts[2](first + self.parts[1](first))

    torch.manual_seed(0)
    model, batches = Skipping(), [torch.randn(64, 16) for _ in range(4)]
    assert not is_chain(model, ["parts.0", "parts.1", "parts.2"], batches[0])
    quantize_model_ptq(model, quantization_bits=4, calibration_data=batches, progress=False)
    assert all(isinstance(part[0], QuantLinear) for part in model.parts)
    assert all(result.rows == 256 for result in model.hf_quantizer.results)


class Two(nn.Module):
    """Two layers in a row, the second of which some inputs skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, *, all_layers: bool = True) -> Tensor:
        return self.second(self.first(x)) if all_layers else self.first(x)


def test_the_static_scale_is_the_largest_magnitude_over_127() -> None:
    model = Two()
    x = torch.tensor([[1.0, -3.0, 2.0, 0.0, 0, 0, 0, 0]])
    quantize_model_ptq(model, quantization_type="static", calibration_data=[x, 2 * x], progress=False)
    assert float(scale_from_bits(model.first.input_scale)) == float(torch.tensor(6 / 127).bfloat16())


def test_a_layer_that_static_activations_cost_too_much_becomes_dynamic_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 8)
    x[5, 2] = 4000
    model = quantize_model_ptq(Two(), quantization_type="static", calibration_data=[x] * 2, progress=False)
    assert str(model.first.scheme) == "int8-channel-dynamic"
    note = next(r.note for r in model.hf_quantizer.results if r.name == "first.weight")
    assert re.search(r"activations: static -?\d+\.\d dB, below 15; dynamic gives \d+\.\d$", note)
    save_quantized(model, tmp_path)
    again = load_quantized(Two(), tmp_path)
    assert str(again.first.scheme) == "int8-channel-dynamic"
    assert torch.equal(again(x[:9]), model(x[:9]))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_where_dynamic_activations_do_not_do_either_they_stay_in_float(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(4096, 8)
    x[:, 2] = 4000  # in every token, so that no scale of a token is fine enough for the others
    with torch.no_grad():
        model.first.weight[:, 2] = 0
    quantize_model_ptq(model, quantization_type=kind, algorithm="gptq", calibration_data=[x] * 2, progress=False)
    assert str(model.first.scheme) == "int8-channel"
    note = next(r.note for r in model.hf_quantizer.results if r.name == "first.weight")
    assert "below 15; weight_only gives" in note
    assert note.count(" dB") == (2 if kind == "static" else 1)
    assert model.hf_quantizer.quantization_config.modules["first"] == "int8-channel"


def test_a_static_layer_that_no_batch_reached_is_named() -> None:
    batch = {"x": torch.randn(4, 8), "all_layers": False}
    with pytest.raises(CalibrationError, match=r"no calibration batch reached second \(weight\); add data"):
        quantize_model_ptq(Two(), quantization_type="static", calibration_data=[batch], progress=False)


def test_bad_values_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"first\.weight: activations are NaN"):
        quantize_model_ptq(Two(), quantization_bits=4, calibration_data=[torch.full((2, 8), math.nan)], progress=False)
    model = Two()
    model.first.weight.data[0, 0] = math.inf
    with pytest.raises(SchemeError, match=r"first\.weight: 1 weights are NaN or infinite"):
        quantize_model_ptq(model, quantization_bits=4, calibration_data=[torch.ones(2, 8)], progress=False)


def test_calibrated_algorithms_are_refused_while_loading(tmp_path: Any) -> None:
    build("t5").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantize_model_ptq"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig(algorithm="gptq"))
    with pytest.raises(CalibrationError, match="algorithm='gptq' needs calibration_data"):
        quantize_model_ptq(build("llama"), algorithm="gptq", progress=False)

"""Equalisation changes nothing in float, and helps where some inputs are much larger than others."""

import statistics

import pytest
import torch
from torch import nn

from hfquant import get_quantization_info, quantize_model_ptq
from hfquant.ptq import calibrated
from hfquant.ptq.awq import equalize_, equalizing
from hfquant.ptq.smoothquant import find_folds
from hfquant.ptq.statistics import Collector
from hfquant.schemes import LayerScheme
from tests.ptq.test_smoothquant import block_of
from tests.support.tiny_models import build, text_inputs


def salient() -> nn.Module:
    """A Llama some of whose normalised inputs are twenty times larger than the rest."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::9] *= 20
    return model


def decibels() -> float:
    """Mean signal to noise ratio of the layers' outputs on held-out tokens."""
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 120, (4, 64))} for _ in range(16)]
    model = salient()
    fields = {"quantization_bits": 4, "group_size": 32, "embedding_bits": 16, "skip_modules": ["lm_head"]}
    quantize_model_ptq(model, algorithm="awq", calibration_data=batches, progress=False, **fields)
    return statistics.mean(result.output_sqnr_db for result in model.hf_quantizer.results)


def test_salient_inputs_get_finer_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    equalized = decibels()
    monkeypatch.setattr(calibrated, "find_folds", lambda *arguments: [])
    plain = decibels()
    assert equalized > plain + 0.3  # the same scale search without the folds


def test_the_float_block_stays_what_it_was() -> None:
    block, layers, run = block_of("llama")
    with torch.no_grad():
        before = run()
        collector = Collector(layers, 1)
        with collector.attached():
            collector.next_batch()
            run()
        schemes = dict.fromkeys(layers, LayerScheme.parse("int4-g32"))
        weights = {name: layer.weight.clone() for name, layer in layers.items()}
        chosen = equalize_(find_folds(block, run, layers), layers, schemes, collector.found)
        assert chosen
        assert all(0 < alpha < 1 for alpha in chosen.values())
        assert all(not torch.equal(layers[name].weight, weights[name]) for name in chosen)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)


def test_it_is_recorded_and_needs_data() -> None:
    model = salient()
    quantize_model_ptq(
        model, quantization_bits=4, algorithm="awq", calibration_data=[text_inputs()] * 8, progress=False
    )
    assert get_quantization_info(model).algorithm == "awq"
    notes = [r.note for r in model.hf_quantizer.results if "alpha" in r.note]
    assert notes
    assert all(note.startswith("inputs rescaled, alpha 0.") for note in notes)


def test_factors() -> None:
    sample = torch.tensor([[1.0, -4.0, 0.0], [3.0, 4.0, 0.0]])
    assert equalizing(sample, 0.5).tolist() == pytest.approx([2**0.5 / 2**0.75, 2 / 2**0.75, 1.0])

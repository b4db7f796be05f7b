"""Folds are found by trying, change nothing in float, and help where activations have outliers."""

import pytest
import torch
from torch import Tensor, nn

from hfquant import quantize_model_ptq
from hfquant.ptq.blocks import record_calls
from hfquant.ptq.smoothquant import Fold, apply_fold_, find_folds, levelling, smooth_
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.schemes import LayerScheme
from tests.support.tiny_models import TINY, build, output, text_inputs


EXPECTED = {
    # what each group of layers reads, and what can absorb its scale
    "llama": {"q_proj k_proj v_proj": "LlamaRMSNorm", "gate_proj up_proj": "LlamaRMSNorm", "down_proj": "Linear"},
    "opt": {"k_proj v_proj q_proj": "LayerNorm", "out_proj": "Linear", "fc1": "LayerNorm", "fc2": "Linear"},
    "bert": {"attention output dense": "Linear"},
}


def block_of(name: str) -> tuple[nn.Module, dict[str, nn.Module], object]:
    model = build(name)
    prefix = {"llama": "model.layers.0", "opt": "model.decoder.layers.0", "bert": "encoder.layer.0"}[name]
    (call,) = record_calls(model, [prefix], [TINY[name].inputs()], pass_through=False)[prefix]
    block = model.get_submodule(prefix)
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    return block, layers, lambda: call.run(block)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_folds_leave_the_float_block_as_it_was(name: str) -> None:
    block, layers, run = block_of(name)
    with torch.no_grad():
        before = run()
        folds = find_folds(block, run, layers)
        assert torch.equal(run(), before)  # trying leaves nothing behind
        assert folds
        for fold in folds:
            apply_fold_(fold, layers, torch.rand(layers[fold.consumers[0]].in_features) + 0.5)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


def test_the_folds_of_a_llama_block() -> None:
    block, layers, run = block_of("llama")
    found = {
        " ".join(n.rpartition(".")[2] for n in f.consumers): type(f.producer).__name__
        for f in find_folds(block, run, layers)
    }
    assert found == EXPECTED["llama"]


def test_a_norm_that_feeds_a_residual_takes_up_nothing() -> None:
    block, layers, run = block_of("bert")  # its norms stand behind the sums and feed the next sum too
    assert all(not type(fold.producer).__name__.endswith("Norm") for fold in find_folds(block, run, layers))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_outliers_cost_less_when_smoothed(kind: str) -> None:
    def outlying() -> nn.Module:
        model = build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight[5] *= 60
                for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    linear.weight[:, 5] /= 60
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[:, 5] /= 60
        return model

    def error(smoothquant: bool) -> Tensor:
        model = outlying()
        before = output(model, "llama")
        torch.manual_seed(1)
        batches = [{"input_ids": torch.randint(3, 120, (2, 24))} for _ in range(7)] + [text_inputs()]
        fields = {"quantization_bits": 8, "quantization_type": kind, "embedding_bits": 16, "smoothquant": smoothquant}
        quantize_model_ptq(model, calibration_data=batches, progress=False, **fields)
        return (output(model, "llama") - before).norm()

    assert error(True) < 0.7 * error(False)


def test_levelling_touches_the_largest_inputs_only() -> None:
    factors = levelling(torch.tensor([1.0, 2.0, 3.0, 40.0, 0.0, 0.5, 1.5, 2.5, 0.1, 5.0]), 0.2)
    assert factors.tolist() == pytest.approx([1, 1, 1, 40 / 3, 1, 1, 1, 1, 1, 5 / 3])


def smoothed(x: Tensor, held: Tensor, scheme: str) -> str:
    """What is done to the inputs of an up and down projection whose inner activations are ``x`` and ``held``."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"up": nn.Linear(16, x.shape[1]), "down": nn.Linear(x.shape[1], 32)})
    layers = {"down": block["down"]}
    statistics = InputStatistics.empty(x.shape[1], x.device)
    statistics.add(x, held=False, sample_rows=len(x))
    statistics.add(held, held=True, sample_rows=len(held))
    fold = Fold(block["up"], ("down",))
    weight = block["down"].weight.clone()
    schemes = {"down": LayerScheme.parse(scheme)}
    chosen = smooth_([fold], layers, schemes, {WeightKey("down", "weight"): statistics}, "minmax")
    assert ("down" in chosen) == (not torch.equal(block["down"].weight, weight))
    return chosen.get("down", "")


def test_factors_are_judged_on_tokens_they_were_not_made_from() -> None:
    generator = torch.Generator().manual_seed(0)
    x, held = (torch.randn(256, 64, generator=generator) for _ in range(2))
    x[:, :4] *= 30
    held[:, :4] *= 30
    x[:, 32:] *= 0.01  # asleep while calibrating, so that strong factors enlarge them
    asleep = torch.cat((held[:, :32], 0.01 * held[:, 32:]), 1)
    alpha = float(smoothed(x, asleep, "int8-channel-static").removeprefix("alpha "))
    assert float(smoothed(x, held, "int8-channel-static").removeprefix("alpha ")) < alpha  # awake, they are cut off


def test_hopeless_static_layers_get_the_factors_of_dynamic_ones() -> None:
    x, held = (torch.randn(256, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    x[0], held[0] = 3000, 3000  # one token of another size, in all inputs: no factor helps
    assert smoothed(x, held, "int8-channel-static") == smoothed(x, held, "int8-channel-dynamic")

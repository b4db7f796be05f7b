"""Folds are found by trying, change nothing in float, and help where activations have outliers."""

import pytest
import torch
from torch import Tensor, nn

from hfquant import quantize_model_ptq
from hfquant.ptq.blocks import record_calls
from hfquant.ptq.smoothquant import apply_fold_, find_folds
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

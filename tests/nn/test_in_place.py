"""Models change what their layers return (Llama 4 adds its experts to it): no result may be a view, nor be saved."""

import pytest
import torch
from torch import Tensor, nn

from hfquant import prepare_model_for_finetuning, prepare_model_qat, quantize_model_ptq
from tests.support.tiny_models import TINY, build


CALIBRATION = [TINY["llama"].inputs()] * 4


def trained(state: str, bits: int, kind: str) -> nn.Module:
    options = {"quantization_bits": bits, "quantization_type": kind, "progress": False}
    if kind == "static":
        options["calibration_data"] = CALIBRATION
    if state == "qat":
        return prepare_model_qat(build("llama"), **options).train()
    model = quantize_model_ptq(build("llama"), **options)
    if state == "packed":
        return model
    return prepare_model_for_finetuning(model, adapter=state, rank=4, progress=False).train()


def gradient(module: nn.Module, x: Tensor, *, in_place: bool) -> Tensor:
    x = x.clone().requires_grad_()
    out = module(x)
    out = out.mul_(2).add_(1) if in_place else out * 2 + 1
    out.square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("kernels", ["fastest", "reference"])
@pytest.mark.parametrize("kind", ["weight_only", "dynamic", "static"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("state", ["packed", "qat", "grid", "scales"])
def test_results_can_be_changed_in_place(
    state: str, bits: int, kind: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "reference":
        monkeypatch.setenv("HFQUANT_KERNELS", "reference")
    model = trained(state, bits, kind)
    module = model.model.layers[0].mlp.down_proj
    for shape in ((5, 96), (2, 5, 96)):
        x = torch.randn(shape)
        assert torch.equal(gradient(module, x, in_place=True), gradient(module, x, in_place=False))
    rows = model.model.embed_tokens(torch.tensor([[3, 4, 5]]))
    rows.add_(1)

"""Quantized tiny models in fine-tuning."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant import prepare_model_for_finetuning, quantize_model_ptq
from tests.support.tiny_models import TINY, build


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"quantization_bits": 4},
    "int4-asymmetric": {"quantization_bits": 4, "symmetric": False, "group_size": 16},
    "int4-residual": {"quantization_bits": 4, "keep_residual": True},
    "int8": {"quantization_bits": 8, "quantization_type": "weight_only"},
    "int8-dynamic": {"quantization_bits": 8, "quantization_type": "dynamic"},
    "int8-static": {"quantization_bits": 8, "quantization_type": "static", "algorithm": "rtn"},
}


def packed_model(name: str, scheme: str = "int4", model: PreTrainedModel | None = None) -> PreTrainedModel:
    """The tiny model ``name``, quantized."""
    options = SCHEMES[scheme]
    data = [TINY[name].inputs()] if "static" in scheme else None
    model = build(name) if model is None else model
    return quantize_model_ptq(model, calibration_data=data, progress=False, **options)


def outputs(model: nn.Module, name: str) -> Tensor:
    """Logits or hidden states of ``model`` on its own inputs, with gradients."""
    out = model(**TINY[name].inputs())
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def train_(model: nn.Module, name: str, *, steps: int = 2, lr: float = 3e-2) -> None:
    """A few optimizer steps towards a fixed random target."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(3)
    target = None
    for _ in range(steps):
        out = outputs(model, name)
        target = torch.randn(out.shape, generator=generator) if target is None else target
        (out - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def finetuned(name: str, scheme: str = "int4", adapter: str = "grid", **options: Any) -> PreTrainedModel:
    """A quantized model after a few steps of fine-tuning, still prepared."""
    model = packed_model(name, scheme)
    prepare_model_for_finetuning(model, adapter, **{"rank": 4, "progress": False} | options)
    train_(model, name)
    return model.eval()

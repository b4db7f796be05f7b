"""Quantized tiny models with PEFT adapters."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant import quantize_model_ptq
from tests.support.tiny_models import TINY, build


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"quantization_bits": 4, "quantization_type": "weight_only"},
    "int4-asymmetric": {"quantization_bits": 4, "quantization_type": "weight_only", "symmetric": False},
    "int8": {"quantization_bits": 8, "quantization_type": "weight_only"},
    "int8-dynamic": {"quantization_bits": 8, "quantization_type": "dynamic"},
    "int4-dynamic": {"quantization_bits": 4, "quantization_type": "dynamic"},
    "int8-static": {"quantization_bits": 8, "quantization_type": "static"},
}


def quantized(name: str = "llama", scheme: str = "int4", **fields: Any) -> PreTrainedModel:
    """The tiny model ``name``, quantized."""
    fields = SCHEMES[scheme] | fields
    data = [TINY[name].inputs()] if fields.get("quantization_type") == "static" else None
    return quantize_model_ptq(build(name), calibration_data=data, algorithm="rtn", progress=False, **fields)


def lora(model: nn.Module, *, seed: int = 1, **fields: Any) -> Any:
    """``model`` with an adapter that does something: every weight of it is random."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | fields
    autocast = fields.pop("autocast_adapter_dtype", True)
    return randomize_(get_peft_model(model, LoraConfig(**fields), autocast_adapter_dtype=autocast), seed=seed)


@torch.no_grad()
def randomize_(model: Any, *, seed: int = 1, std: float = 0.05, adapter: str = "default") -> Any:
    """Fill the weights of an adapter with noise, so that it changes what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}" in name:
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Every integer tensor by the name it has without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters(remove_duplicate=False)
        if not p.is_floating_point()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both hold equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())

"""What an engine computes that simulates INT8 activations in float, as compressed-tensors does in Transformers."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfquant.nn.quant_linear import QuantLinear
from hfquant.numerics.affine import dequantize, quantize, scale_from_bits


def simulate_activations_(model: PreTrainedModel, *, divisor: float) -> None:
    """Let the layers with INT8 activations compute ``linear(fake_quantize(x), dequantize(weight))``."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.scheme.activation is not None:
            module.forward = _simulated(module, divisor)


def _simulated(module: QuantLinear, divisor: float):
    def forward(x: Tensor) -> Tensor:
        if not module.scheme.activation.symmetric:
            return torch.nn.functional.linear(_spanning(x), module.dequantize(), module.bias)
        if module.scheme.activation.dynamic:
            scale = x.abs().amax(-1, keepdim=True) / divisor
            scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        else:
            scale = scale_from_bits(module.input_scale)
        rounded = dequantize(quantize(x, scale, bits=8), scale, dtype=x.dtype)
        return torch.nn.functional.linear(rounded, module.dequantize(), module.bias)

    return forward


def _spanning(x: Tensor) -> Tensor:
    """Asymmetric INT8 of each token. Engines add the zero point before they round, hfquant after: near ties differ."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    zero_point = (-128 - low / scale).round().clamp(-128, 127)
    codes = torch.round(x / scale + zero_point).clamp(-128, 127)
    return (codes - zero_point) * scale

"""Packing one module, round to nearest."""

import torch
from torch import nn

from hfquant.nn.packed_module import PackedModule
from hfquant.nn.select import packed_class
from hfquant.numerics.affine import scale_to_bits
from hfquant.ptq.quantize_weight import quantize_weight
from hfquant.schemes import LayerScheme


def pack_(module: nn.Module, scheme: str, *, input_scale: float = 0.02) -> PackedModule:
    """Quantize one module in place."""
    parsed = LayerScheme.parse(scheme)
    target = packed_class(module)
    packed = {
        key: quantize_weight(w.to_rows(module.get_parameter(key)), parsed.weight, algorithm="rtn", name=key).packed
        for key, w in target.weights_of(module).items()
    }
    target.swap_(module, parsed)
    for key, value in packed.items():
        module.load_packed(value, key)
        if parsed.quantization_type == "static":
            module.set_input_scale(scale_to_bits(torch.tensor([input_scale])), key)
    return module

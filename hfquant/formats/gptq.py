"""GPTQ checkpoints: what vLLM, GPTQModel, OpenVINO, ONNX Runtime and others read.

For each quantized ``nn.Linear`` ``P`` with codes ``[N, K]`` and groups of G inputs:

    P.qweight  int32 [K * bits / 32, N]      unsigned codes, packed along K, least significant first
    P.qzeros   int32 [K // G, N * bits / 32] unsigned zero points, packed along N
    P.scales   fp16  [K // G, N]             of either sign
    P.g_idx    int32 [K]                     group of each input: ``k // G``

``weight = (code - zero) * scale``. Version 1 (``checkpoint_format: gptq``) stores ``zero - 1``, version 2
(``gptq_v2``) stores ``zero``. A zero of 0 does not survive version 1: readers add 1 to whole words, and the wrap-around
carries into the neighbour. Symmetric weights have the zero ``2**(bits - 1)`` everywhere.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import FormatError, SchemeError
from hfquant.formats.stored_weight import StoredWeight
from hfquant.numerics.packing import pack, unpack
from hfquant.schemes import LayerScheme, WeightScheme


QUANT_METHOD = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def layer_tensors(weight: StoredWeight, *, version: int) -> dict[str, Tensor]:
    """What is stored for one linear layer, by the names behind the module's own.

    Raises:
        SchemeError: If the layer has no place in the format, with what would have.
    """
    bits, (rows, columns) = weight.scheme.weight.bits, weight.float_weight.shape
    if weight.scheme.activation is not None:
        raise SchemeError(f"{weight.module}: GPTQ has no place for INT8 activations; export to compressed-tensors")
    if columns % (32 // bits) or rows % (32 // bits):
        raise SchemeError(
            f"{weight.module}: GPTQ packs {32 // bits} codes a word, and {rows}x{columns} is no multiple of that; "
            "export to compressed-tensors"
        )
    offset = 1 << (bits - 1)
    zeros = weight.zero_point
    zeros = torch.zeros(weight.packed.weight_scale.shape, dtype=torch.int8) if zeros is None else zeros
    if version == 1:
        if bool((zeros == -offset).any()):
            raise SchemeError(
                f"{weight.module}: zero points at the lowest code do not survive GPTQ version 1; export with version=2"
            )
        zeros = zeros - 1
    groups = weight.packed.weight_scale.shape[-1]
    return {
        "qweight": weight.packed.weight.t().contiguous(),
        "qzeros": pack(zeros.t().contiguous(), bits=bits),
        "scales": weight.scale_in(torch.float16).t().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


def quantization_config(scheme: LayerScheme, kept: list[str], *, version: int, written_by: str) -> dict[str, Any]:
    """``quantization_config`` for ``config.json``, and the content of ``quantize_config.json``.

    Args:
        scheme: The one scheme of all quantized layers.
        kept: Linear layers that stay in float, beside the output head.
        version: 1 or 2.
        written_by: Name and version of the program.
    """
    name = "gptq" if version == 1 else "gptq_v2"
    fields: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "bits": scheme.weight.bits,
        "group_size": scheme.weight.group_size or -1,
        "desc_act": False,
        "sym": scheme.weight.symmetric,
        "lm_head": False,
        "static_groups": False,
        "true_sequential": True,
        "checkpoint_format": name,
        "format": name,
        "pack_dtype": "int32",
        "meta": {"quantizer": [written_by]},
    }
    if kept:
        fields["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in kept}
    return fields


def read_scheme(config: Mapping[str, Any]) -> LayerScheme:
    """The scheme of all layers, from a ``quantization_config``.

    Raises:
        SchemeError: If hfquant cannot hold it.
    """
    bits, size = config.get("bits"), config.get("group_size")
    mixed = any(key.startswith("+") for key in config.get("dynamic") or ())
    if bits not in (4, 8) or not isinstance(size, int) or mixed:
        raise SchemeError(f"GPTQ with bits={bits!r}, group_size={size!r} or other schemes per layer cannot be imported")
    return LayerScheme(WeightScheme(bits, None if size == -1 else size, bool(config.get("sym", True))))


def read_layer(
    name: str, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int], *, version: int
) -> dict[str, Any]:
    """Codes, scales and zero points of one layer, as ``compressed_tensors.read_layer`` gives them.

    Raises:
        FormatError: If a tensor is missing or misshapen.
        SchemeError: If the inputs were reordered (``desc_act``).
    """
    bits, groups = scheme.weight.bits, scheme.weight.groups(shape[1])
    sizes = {
        "qweight": (shape[1] * bits // 32, shape[0]),
        "qzeros": (groups, shape[0] * bits // 32),
        "scales": (groups, shape[0]),
    }
    for key, size in sizes.items():
        found = tensors.get(key)
        if found is None or tuple(found.shape) != size:
            raise FormatError(
                f"{name}.{key}: expected {list(size)}, found {None if found is None else list(found.shape)}"
            )
    if "g_idx" in tensors and not torch.equal(tensors["g_idx"].long(), torch.arange(shape[1]) // (shape[1] // groups)):
        raise SchemeError(f"{name}: its inputs are in activation order (desc_act); quantize with desc_act=False")
    codes = unpack(tensors["qweight"].t().contiguous(), bits=bits, length=shape[1])
    zeros = unpack(tensors["qzeros"], bits=bits, length=shape[0]).t()
    if version == 1:
        lowest = -(1 << (bits - 1))
        zeros = torch.where(zeros == -lowest - 1, lowest, zeros + 1).to(torch.int8)
    if scheme.weight.symmetric and bool((zeros != 0).any()):
        raise FormatError(f"{name}.qzeros: the checkpoint says it is symmetric, but has zero points")
    zero_point = None if scheme.weight.symmetric else zeros
    return {"codes": codes, "scale": tensors["scales"].t(), "zero_point": zero_point, "input_scale": None}

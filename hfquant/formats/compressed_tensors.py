"""compressed-tensors: what Transformers, vLLM and SGLang serve.

For each quantized ``nn.Linear`` ``P`` with codes ``[N, K]`` (https://github.com/vllm-project/compressed-tensors):

    pack-quantized   P.weight_packed      int32 [N, ceil(K * bits / 32)]   the canonical packed layout, unchanged
                     P.weight_shape       int64 [2]                        N, K
                     P.weight_zero_point  int32 [ceil(N * bits / 32), G]   asymmetric only; packed along the rows
    int-quantized    P.weight             int8  [N, K]                     signed codes
    both             P.weight_scale       bf16  [N, K // G]                of either sign: a plain factor
                     P.input_scale        bf16  [1]                        static activations only

``weight = (codes - zero_point) * scale``. Weight-only layers are packed. Layers with INT8 activations are
``int-quantized`` at 8 bits; at 4 bits they are packed, or hold one code a byte where the engine needs that (vLLM's CPU
build ignores the activations of packed ones).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import FormatError, SchemeError
from hfquant.formats.stored_weight import StoredWeight
from hfquant.numerics.affine import code_range
from hfquant.numerics.packing import pack, unpack
from hfquant.schemes import ActivationScheme, LayerScheme, WeightScheme


QUANT_METHOD = "compressed-tensors"
PACKED, INTEGERS = "pack-quantized", "int-quantized"
SUFFIXES = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight", "input_scale")

EXPERTS = "re:.*[.]experts[.].*"
"""How Transformers recognises the scheme of fused experts among several."""

WRITTEN_FOR = "0.20.0"
"""The compressed-tensors release whose format this is; informational in the config."""


def storage(scheme: LayerScheme, *, bytes_for_int4: bool = False) -> str:
    """``pack-quantized`` or ``int-quantized``.

    Args:
        scheme: Of one layer.
        bytes_for_int4: One byte for each 4-bit code where activations are quantized.
    """
    if scheme.activation is None or (scheme.weight.bits == 4 and not bytes_for_int4):
        return PACKED
    return INTEGERS


def layer_tensors(weight: StoredWeight, dtype: torch.dtype, *, bytes_for_int4: bool = False) -> dict[str, Tensor]:
    """What is stored for one linear layer, by the names behind the module's own.

    Args:
        weight: The layer.
        dtype: Of the model: engines cast scales to it, so float16 must hold them exactly. Experts have their scales in
            this dtype, because Transformers computes their weights in the dtype of the scales.
        bytes_for_int4: As given to ``storage``.

    Raises:
        SchemeError: If ``dtype`` is float16 and cannot hold a scale.
    """
    own = dtype if dtype == torch.float16 or weight.kind == "experts" else torch.bfloat16
    scale = weight.scale_in(own)
    if storage(weight.scheme, bytes_for_int4=bytes_for_int4) == INTEGERS:
        tensors = {"weight": weight.codes, "weight_scale": scale}
    else:
        shape = torch.tensor(weight.float_weight.shape[-2:], dtype=torch.int64)
        tensors = {"weight_packed": weight.packed.weight, "weight_shape": shape, "weight_scale": scale}
        if weight.zero_point is not None:
            rows = pack(weight.zero_point.transpose(-1, -2).contiguous(), bits=weight.scheme.weight.bits)
            tensors["weight_zero_point"] = rows.transpose(-1, -2).contiguous()
    if weight.input_scale is not None:
        tensors["input_scale"] = weight.input_scale.view(torch.bfloat16).clone()
    return tensors


def quantization_config(
    schemes: Mapping[str, LayerScheme], ignored: Iterable[str], *, bytes_for_int4: bool = False
) -> dict[str, Any]:
    """``quantization_config`` for ``config.json``.

    Args:
        schemes: Name of each quantized linear layer in the checkpoint -> scheme.
        ignored: Names of the linear layers that are not quantized.
        bytes_for_int4: As given to ``layer_tensors``.
    """
    names: dict[LayerScheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(scheme, []).append(name)
    groups, formats = {}, []
    for number, (scheme, modules) in enumerate(names.items()):
        formats.append(storage(scheme, bytes_for_int4=bytes_for_int4))
        targets = ["Linear"] if len(names) == 1 else sorted(modules)
        if len(names) > 1 and any(".experts." in name for name in modules):
            targets.append(EXPERTS)
        groups[f"group_{number}"] = {"targets": targets, "format": formats[-1], **_scheme_fields(scheme)}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats[0] if len(set(formats)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": WRITTEN_FOR,
    }


def _scheme_fields(scheme: LayerScheme) -> dict[str, Any]:
    weight, activation = scheme.weight, scheme.activation
    fields = {"type": "int", "symmetric": weight.symmetric, "dynamic": False, "num_bits": weight.bits}
    fields |= {"strategy": "channel" if weight.group_size is None else "group", "group_size": weight.group_size}
    inputs = None
    if activation is not None:
        strategy = "token" if activation.dynamic else "tensor"
        inputs = {"num_bits": 8, "type": "int", "symmetric": activation.symmetric}
        inputs |= {"dynamic": activation.dynamic, "strategy": strategy}
    return {"weights": fields, "input_activations": inputs, "output_activations": None}


def read_schemes(config: Mapping[str, Any]) -> list[tuple[LayerScheme, list[str]]]:
    """The scheme and the targets of each group of a ``quantization_config``.

    Raises:
        SchemeError: If the checkpoint holds something that hfquant does not compute.
        FormatError: If the config is damaged.
    """
    try:
        if config.get("quantization_status", "compressed") != "compressed":
            raise SchemeError(f"quantization_status={config['quantization_status']!r}: expected 'compressed'")
        if config.get("kv_cache_scheme") is not None:
            raise SchemeError("the checkpoint quantizes the key-value cache, which hfquant does not")
        groups = config["config_groups"].values()
        return [(_read_group(group), list(group["targets"])) for group in groups]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"quantization_config cannot be read ({error!r}); config.json is damaged") from error


def _read_group(group: Mapping[str, Any]) -> LayerScheme:
    weights, inputs = group["weights"], group.get("input_activations")
    strategy, size = weights["strategy"], weights.get("group_size")
    known = weights["type"] == "int" and weights["num_bits"] in (4, 8) and strategy in ("group", "channel")
    if not known or weights.get("actorder") in ("group", "dynamic", True) or group.get("output_activations"):
        raise SchemeError(
            f"a group with weights {dict(weights)!r} cannot be imported; expected 4 or 8 bit integers with one scale "
            "per group or channel, without group activation order and quantized outputs"
        )
    activation = None
    if inputs is not None:
        dynamic, symmetric = bool(inputs.get("dynamic", False)), bool(inputs["symmetric"])
        kind = (inputs["type"], inputs["num_bits"], inputs["strategy"])
        if kind != ("int", 8, "token" if dynamic else "tensor") or not (symmetric or dynamic):
            raise SchemeError(
                f"input_activations {dict(inputs)!r}: expected INT8, per token, or per tensor and symmetric"
            )
        activation = ActivationScheme(dynamic, symmetric)
    weight = WeightScheme(weights["num_bits"], size if strategy == "group" else None, weights["symmetric"])
    return LayerScheme(weight, activation)


def read_layer(name: str, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int]) -> dict[str, Any]:
    """Codes, scales and zero points of one layer.

    Args:
        name: Of the layer, for errors.
        tensors: What is stored, by the names behind the module's own.
        scheme: Of the layer.
        shape: ``(N, K)`` of the float weight.

    Returns:
        ``codes [N, K]`` int8, ``scale [N, K // G]``, ``zero_point [N, K // G]`` int8 or ``None``, ``input_scale`` or
        ``None``.

    Raises:
        FormatError: If a tensor is missing, misshapen or out of range.
    """
    bits, groups = scheme.weight.bits, scheme.weight.groups(shape[1])
    if "weight_packed" in tensors:
        words = tensors["weight_packed"]
        _expect(name, "weight_packed", words, torch.int32, (shape[0], -(-shape[1] * bits // 32)))
        codes = unpack(words, bits=bits, length=shape[1])
    else:
        codes = tensors["weight"]
        _expect(name, "weight", codes, torch.int8, shape)
        if codes.numel() and not code_range(bits)[0] <= int(codes.min()) <= int(codes.max()) <= code_range(bits)[1]:
            raise FormatError(f"{name}.weight holds codes beyond {bits} bits; the file is damaged")
    zero_point = tensors.get("weight_zero_point")
    if not scheme.weight.symmetric:
        if zero_point is None:
            raise FormatError(f"{name}.weight_zero_point is missing; the scheme is asymmetric")
        if zero_point.dtype == torch.int32:
            _expect(name, "weight_zero_point", zero_point, torch.int32, (-(-shape[0] * bits // 32), groups))
            zero_point = unpack(zero_point.t().contiguous(), bits=bits, length=shape[0]).t()
    scale = tensors.get("weight_scale")
    if scale is None or tuple(scale.shape) != (shape[0], groups):
        found = None if scale is None else list(scale.shape)
        raise FormatError(f"{name}.weight_scale: expected {[shape[0], groups]}, found {found}")
    zeros = None if scheme.weight.symmetric else zero_point
    return {"codes": codes, "scale": scale, "zero_point": zeros, "input_scale": tensors.get("input_scale")}


def _expect(name: str, key: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"{name}.{key}: expected {dtype} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}; config.json and "
            "the weights do not belong together"
        )

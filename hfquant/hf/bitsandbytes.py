"""The bitsandbytes backend: the same settings and calls, with bitsandbytes' modules, kernels and checkpoints.

INT8 is LLM.int8 (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), INT4 is NF4 or FP4 in blocks of 64 (Dettmers
et al. 2023, https://arxiv.org/abs/2305.14314). Models are those that ``BitsAndBytesConfig`` makes: plain Transformers
loads what is saved, and models that plain Transformers made are understood here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import _assign_is_quantized

from hfquant.errors import ConfigError
from hfquant.hf.config import HfQuantConfig


BACKEND = "bitsandbytes"
BLOCK = 64
LAYERS = ("Linear4bit", "Linear8bitLt")

FIXED: dict[str, tuple[Any, str]] = {
    "symmetric": (True, "has no zero points"),
    "algorithm": (None, "chooses its codes by a rule of its own"),
    "embedding_bits": (16, "keeps embeddings and output heads in float"),
    "overrides": (None, "has one scheme for the whole model"),
    "strict": (False, "does not report layers that it skips before loading"),
}
"""Field -> the only value bitsandbytes can do, and why."""


def to_bitsandbytes_config(config: HfQuantConfig) -> BitsAndBytesConfig:
    """The settings in bitsandbytes' words; what is not set is what bitsandbytes does, NF4 for 4 bits.

    Raises:
        ConfigError: If something was asked for that bitsandbytes cannot do, or it is not installed.
    """
    import_bitsandbytes()
    bits = config.quantization_bits or 8
    for name, (only, reason) in FIXED.items():
        value = getattr(config, name)
        if value is not None and value != only:
            raise ConfigError(f"{name}={value!r}: backend='bitsandbytes' {reason}; use backend='hfquant'")
    kind, size = ("dynamic", -1) if bits == 8 else ("weight_only", BLOCK)
    if config.quantization_type not in (None, kind):
        raise ConfigError(
            f"quantization_type={config.quantization_type!r}: with {bits} bits backend='bitsandbytes' computes "
            f"{kind!r} only; use backend='hfquant'"
        )
    if config.group_size not in (None, size):
        raise ConfigError(
            f"group_size={config.group_size}: with {bits} bits backend='bitsandbytes' takes {size}; "
            "use backend='hfquant'"
        )
    skipped = [*(config.skip_modules or ()), *(["lm_head"] if config.skip_modules else ())]
    if any("*" in name or "?" in name for name in skipped):
        raise ConfigError(f"skip_modules={config.skip_modules!r}: backend='bitsandbytes' takes names, no globs")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped or None)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type or "nf4",
        bnb_4bit_use_double_quant=bool(config.bnb_4bit_use_double_quant),
        llm_int8_skip_modules=skipped or None,
    )


def import_bitsandbytes() -> Any:
    """The package.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("backend='bitsandbytes' needs it: pip install 'hfquant[bitsandbytes]'") from error
    return bitsandbytes


def bitsandbytes_quantizer(config: HfQuantConfig, **kwargs: Any) -> Any:
    """Transformers' quantizer for bitsandbytes, with weights that stay as they are (``keep_exact_``)."""
    quantizer = AutoHfQuantizer.from_config(to_bitsandbytes_config(config), **kwargs)
    after = quantizer._process_model_after_weight_loading

    def process(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        after(model, **options)
        return keep_exact_(model)

    quantizer._process_model_after_weight_loading = process
    return quantizer


def quantize_with_bitsandbytes_(model: nn.Module, config: HfQuantConfig) -> None:
    """Quantize a float model in memory, in place, as if it had been loaded so.

    Raises:
        ConfigError: If bitsandbytes cannot do what was asked for, or ``model`` is no Transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"backend='bitsandbytes' quantizes Transformers models, not a {type(model).__name__}")
    quantizer = bitsandbytes_quantizer(config, pre_quantized=False)
    floats = dict(model.named_modules())
    device = next(model.parameters()).device
    training = model.training
    quantizer._process_model_before_weight_loading(model, device_map={"": device})
    operation = quantizer.get_quantize_ops()
    for name, layer in list(bitsandbytes_layers(model)):
        weight, bias = floats[name].weight, floats[name]._parameters.get("bias")
        assert isinstance(weight, Tensor)
        packed = operation.convert({f"{name}.weight": weight.detach()}, model=model, full_layer_name=f"{name}.weight")
        layer.weight = packed[f"{name}.weight"]
        layer._parameters["bias"] = bias
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    _assign_is_quantized(model)
    quantizer._process_model_after_weight_loading(model)
    model.train(training)


def bitsandbytes_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantized layers of ``model`` with their names, whoever made them."""
    for name, module in model.named_modules():
        if any(kind.__name__ in LAYERS and kind.__module__.startswith("bitsandbytes") for kind in type(module).__mro__):
            yield name, module


def is_bitsandbytes(model: nn.Module) -> bool:
    """Whether bitsandbytes quantized ``model``."""
    return next(bitsandbytes_layers(model), None) is not None


def keep_exact_(model: Any) -> Any:
    """Keep 4-bit layers from repacking their weights for AVX512-BF16, in place; call it on plain Transformers' models.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight in the first evaluation. That rounds its block scales
    to bfloat16 for good, fails where the inputs are no multiple of the block, and the packed kernel has no gradient:
    training after an evaluation loses the gradient of every layer below, with no more than a warning. Evaluation
    without it is slower and exact.
    """
    for _, layer in bitsandbytes_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            unpack_(layer)
            layer.support_avx512bf16_for_cpu = False
    return model


def unpack_(layer: Any) -> None:
    """Undo the repacking of a 4-bit weight, if it was repacked; its scales stay rounded."""
    state: Any = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)


def dequantize_bitsandbytes_(model: Any, dtype: torch.dtype) -> Any:
    """Float layers of the values that bitsandbytes' codes stand for, in place."""
    for _, layer in bitsandbytes_layers(model):
        unpack_(layer)
    model.dequantize(dtype)
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(attribute, None)
    model.is_quantized = False
    return model.to(dtype)


def bitsandbytes_parameters(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Facts of each quantized weight: name, scheme, shape, bytes and scales, as ``QuantizedParameter`` names them."""
    from bitsandbytes.functional import dequantize_blockwise

    for name, layer in bitsandbytes_layers(model):
        shape, weight = (layer.out_features, layer.in_features), layer.weight
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = bool(getattr(state, "nested", False))
            scale = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
            scale = scale.float().abs()
            scheme = f"{state.quant_type}-g{state.blocksize}{'-double' if nested else ''}"
            extra = state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
        else:
            found = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
            scale, scheme, extra = found.float() / 127, "llm.int8-channel", found.nbytes
        yield {
            "name": f"{name}.weight",
            "scheme": scheme,
            "shape": shape,
            "tied_to": None,
            "bytes_before": shape[0] * shape[1] * (model.dtype.itemsize if isinstance(model, PreTrainedModel) else 4),
            "bytes_after": weight.nbytes + extra,
            "scale_min": float(scale.min()),
            "scale_mean": float(scale.mean()),
            "scale_max": float(scale.max()),
            "sqnr_db": None,
        }

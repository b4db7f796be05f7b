"""``get_quantization_info``: what is quantized, how well, what is kept and why."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.finetune.adapted import training_bytes
from hfquant.hf.bitsandbytes import bitsandbytes_parameters, is_bitsandbytes
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.hf.roles import model_roles
from hfquant.nn.packed_module import FloatWeight, PackedModule, packed_bytes
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.select import group_keep_reason, has_quantizable_weight, tied_groups
from hfquant.numerics.affine import scale_from_bits


@dataclass(frozen=True)
class QuantizedParameter:
    """One float parameter that is stored as codes.

    Attributes:
        name: Full name of the parameter.
        scheme: As in ``int4-g64``.
        shape: Of the float weight, ``(..., N, K)``.
        tied_to: Name of the parameter whose codes it shares, if any.
        bytes_before: As a float in the model's dtype; 0 if tied.
        bytes_after: Codes, scales and zero points; 0 if tied.
        scale_min: Smallest magnitude of its scales, in units of the weight.
        scale_mean: Mean magnitude.
        scale_max: Largest magnitude.
        sqnr_db: Signal to quantization noise ratio in decibels, if this process quantized it.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    tied_to: str | None
    bytes_before: int
    bytes_after: int
    scale_min: float
    scale_mean: float
    scale_max: float
    sqnr_db: float | None

    @property
    def numel(self) -> int:
        """Weights that are stored here; 0 if tied."""
        return 0 if self.tied_to else FloatWeight(self.shape).numel


@dataclass(frozen=True)
class KeptParameter:
    """One parameter that stays in float.

    Attributes:
        name: Full name.
        reason: Why it is not quantized.
        shape: Sizes.
        dtype: As in ``float32``.
        bytes: Size; 0 if tied.
    """

    name: str
    reason: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class FinetuningInfo:
    """What fine-tuning changed, and what it takes while it goes on.

    Attributes:
        adapter: ``"grid"``, ``"scales"``, or ``"side"`` after it was merged.
        residual: Where ``"grid"`` has rounding residuals from: ``"ptq"``, ``"dither"`` or ``"mixed"``; else ``None``.
        codes: Codes of the adapted layers.
        codes_moved: Of those, how many differ from what training started from.
        scales: Scales of the adapted layers.
        scales_moved: Of those, how many differ.
        weight_bytes: In training: codes, scales and residuals of the adapted layers; else 0.
        learned_scale_bytes: In training: the logarithms of their scales.
        adapter_bytes: In training: ``A`` and ``B``.
        optimizer_bytes: State of the optimizer that was given.
    """

    adapter: str
    residual: str | None
    codes: int
    codes_moved: int
    scales: int
    scales_moved: int
    weight_bytes: int = 0
    learned_scale_bytes: int = 0
    adapter_bytes: int = 0
    optimizer_bytes: int = 0

    def __str__(self) -> str:
        start = {"ptq": ", from kept residuals", "dither": ", from dither"}.get(self.residual or "", "")
        text = (
            f"fine-tuned ({self.adapter}{start}): {self.codes_moved} of {self.codes} codes "
            f"({100 * self.codes_moved / max(1, self.codes):.2f} %) and {self.scales_moved} of {self.scales} scales "
            "moved"
        )
        if not self.weight_bytes:
            return text
        return (
            f"{text}\nin training: {_size(self.weight_bytes)} packed "
            f"({self.weight_bytes / max(1, self.codes):.3f} bytes a weight), {_size(self.learned_scale_bytes)} learned "
            f"scales, {_size(self.adapter_bytes)} adapters, {_size(self.optimizer_bytes)} optimizer state"
        )


@dataclass(frozen=True)
class QuantizationInfo:
    """Every parameter of a model, quantized or kept with the reason.

    Attributes:
        is_quantized: Whether hfquant quantized the model.
        quantization_mode: ``"ptq"`` or ``"qat"``; ``None`` if not quantized.
        quantization_bits: Bits of the linear weights, unless overridden.
        quantization_type: Of their activations, unless overridden.
        algorithm: What chose the scales.
        embedding_bits: Bits of the input embedding and output head.
        quantized: Parameters stored as codes.
        kept: Parameters in float.
        finetuning: What fine-tuning changed, if the model was or is in fine-tuning.
    """

    is_quantized: bool
    quantization_mode: str | None = None
    quantization_bits: int | None = None
    quantization_type: str | None = None
    algorithm: str | None = None
    embedding_bits: int | None = None
    quantized: tuple[QuantizedParameter, ...] = ()
    kept: tuple[KeptParameter, ...] = field(default=())
    finetuning: FinetuningInfo | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters in float."""
        return sum(q.bytes_before for q in self.quantized) + sum(k.bytes for k in self.kept)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as they are."""
        return sum(q.bytes_after for q in self.quantized) + sum(k.bytes for k in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and zero points for each quantized weight."""
        weights = sum(q.numel for q in self.quantized)
        return 8 * sum(q.bytes_after for q in self.quantized) / weights if weights else 0.0

    @property
    def coverage(self) -> float:
        """Share of all weights that is quantized, from 0 to 1."""
        weights = sum(q.numel for q in self.quantized)
        kept = sum(FloatWeight(k.shape).numel for k in self.kept if k.bytes)
        return weights / (weights + kept) if weights + kept else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: all fields, and the totals."""
        totals = ("bytes_before", "bytes_after", "bits_per_weight", "coverage")
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def __str__(self) -> str:
        if not self.is_quantized:
            return f"not quantized: {len(self.kept)} parameters, {_size(self.bytes_before)}"
        lines = [
            f"INT{self.quantization_bits} {self.quantization_type} ({self.quantization_mode}, {self.algorithm}), "
            f"embeddings in {self.embedding_bits} bits",
            f"{_size(self.bytes_before)} -> {_size(self.bytes_after)} "
            f"({self.bytes_before / max(1, self.bytes_after):.2f}x smaller), "
            f"{self.bits_per_weight:.2f} bits per quantized weight, {100 * self.coverage:.1f} % of weights quantized",
            *([] if self.finetuning is None else str(self.finetuning).splitlines()),
            "",
            *_table(("quantized", "scheme", "shape", "SQNR dB"), [_quantized_row(q) for q in self.quantized]),
            "",
            *_table(("kept", "dtype", "shape", "reason"), [_kept_row(k) for k in self.kept]),
        ]
        return "\n".join(lines)


def get_quantization_info(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> QuantizationInfo:
    """What is quantized in ``model``, how, and why the rest is kept; also for a model that is not quantized.

    Args:
        model: Any model.
        optimizer: Of a model in fine-tuning, to count its state.
    """
    if is_bitsandbytes(model):
        return _bitsandbytes_info(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, HfQuantQuantizer):
        return QuantizationInfo(False, kept=tuple(_kept(model, None)))
    config: HfQuantConfig = quantizer.quantization_config
    settings = config.resolve()
    return QuantizationInfo(
        is_quantized=True,
        quantization_mode=config.quantization_mode or "ptq",
        quantization_bits=settings.bits,
        quantization_type=settings.quantization_type,
        algorithm=config.resolved_algorithm,
        embedding_bits=settings.embedding_bits,
        quantized=tuple(_quantized(model)),
        kept=tuple(_kept(model, quantizer)),
        finetuning=_finetuning(model, quantizer, optimizer),
    )


def _finetuning(
    model: nn.Module, quantizer: HfQuantQuantizer, optimizer: torch.optim.Optimizer | None
) -> FinetuningInfo | None:
    if quantizer.finetuning is None:
        found = quantizer.quantization_config.finetuning
        known = {item.name for item in fields(FinetuningInfo)}
        return None if not found else FinetuningInfo(**{key: value for key, value in found.items() if key in known})
    sizes, states = training_bytes(model), [] if optimizer is None else optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return FinetuningInfo(
        **quantizer.finetuning.summary(model),
        weight_bytes=sizes.weights,
        learned_scale_bytes=sizes.learned_scales,
        adapter_bytes=sizes.adapters,
        optimizer_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def activation_shares(model: nn.Module) -> dict[str, float]:
    """Share of the weights of linear layers and experts, without output heads, by what their activations are.

    In a dense model that is the share of multiply-adds: each weight takes one for a token.
    """
    heads, counts = model_roles(model).heads, dict.fromkeys(("static", "dynamic", "weight_only", "float"), 0)
    for name, module in model.named_modules():
        if name in heads:
            continue
        if isinstance(module, PackedModule) and not isinstance(module, QuantEmbedding):
            counts[module.scheme.quantization_type] += sum(w.numel for w in module.float_weights.values())
        elif isinstance(module, nn.Linear) and not isinstance(module, PackedModule):
            counts["float"] += module.weight.numel()
    total = sum(counts.values())
    return {kind: count / total for kind, count in counts.items()} if total else {}


def _bitsandbytes_info(model: nn.Module) -> QuantizationInfo:
    quantized = tuple(QuantizedParameter(**fields) for fields in bitsandbytes_parameters(model))
    names = {parameter.name for parameter in quantized}
    kept = (replace(k, reason="bitsandbytes keeps it") for k in _kept(model, None) if k.name not in names)
    four = all(parameter.scheme != "llm.int8-channel" for parameter in quantized)
    return QuantizationInfo(
        is_quantized=True,
        quantization_mode="ptq",
        quantization_bits=4 if four else 8,
        quantization_type="weight_only" if four else "dynamic",
        algorithm="bitsandbytes",
        embedding_bits=16,
        quantized=quantized,
        kept=tuple(kept),
    )


def _quantized(model: nn.Module) -> Iterator[QuantizedParameter]:
    owners: dict[int, str] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        for key, weight in module.float_weights.items():
            name = f"{module_name}.{key}" if module_name else key
            owner = owners.setdefault(id(module._parameters[key]), name)
            tied = None if owner == name else owner
            scale = scale_from_bits(module.packed(key).weight_scale).abs()
            has_values = scale.numel() > 0 and not scale.is_meta
            yield QuantizedParameter(
                name=name,
                scheme=str(module.scheme),
                shape=weight.shape,
                tied_to=tied,
                bytes_before=0 if tied else weight.numel * module.compute_dtype.itemsize,
                bytes_after=0 if tied else packed_bytes(weight, module.scheme),
                scale_min=float(scale.min()) if has_values else float("nan"),
                scale_mean=float(scale.mean()) if has_values else float("nan"),
                scale_max=float(scale.max()) if has_values else float("nan"),
                sqnr_db=module.sqnr_db.get(key),
            )


def _kept(model: nn.Module, quantizer: HfQuantQuantizer | None) -> Iterator[KeptParameter]:
    modules = dict(model.named_modules())
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module_name, _, key = name.rpartition(".")
        module = modules[module_name]
        if isinstance(module, PackedModule) and (key in module.float_weights or key in module.companions()):
            continue
        owner = owners.setdefault(id(parameter), name)
        reason = f"tied to {owner}" if owner != name else _reason(model, module_name, modules, key, quantizer)
        size = 0 if owner != name else parameter.numel() * parameter.element_size()
        yield KeptParameter(name, reason, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), size)


def _reason(
    model: nn.Module, name: str, modules: dict[str, nn.Module], key: str, quantizer: HfQuantQuantizer | None
) -> str:
    if quantizer is None:
        return "the model is not quantized"
    module, parameter = modules[name], modules[name]._parameters[key]
    if key == "bias" or key.endswith("_bias"):
        return "bias"
    known = quantizer.selection.kept.get(name)
    if known is not None:
        return known
    if has_quantizable_weight(module):
        settings, roles = quantizer.quantization_config.resolve(), model_roles(model)
        reason = group_keep_reason(name, modules, settings, roles, tied_groups(modules, roles))
        return reason or "not quantized when the checkpoint was made"
    if isinstance(parameter, Tensor) and parameter.ndim <= 1:
        return "norm" if "norm" in type(module).__name__.lower() else "vector"
    return "convolution" if "conv" in type(module).__name__.lower() else f"parameter of {type(module).__name__}"


def _quantized_row(parameter: QuantizedParameter) -> tuple[str, ...]:
    sqnr = "" if parameter.sqnr_db is None else f"{parameter.sqnr_db:.1f}"
    scheme = f"tied to {parameter.tied_to}" if parameter.tied_to else parameter.scheme
    return parameter.name, scheme, "x".join(map(str, parameter.shape)), sqnr


def _kept_row(parameter: KeptParameter) -> tuple[str, ...]:
    return parameter.name, parameter.dtype, "x".join(map(str, parameter.shape)), parameter.reason


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"

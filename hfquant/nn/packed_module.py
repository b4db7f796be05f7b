"""What every module with packed weights shares: its parameters, and the way back to float.

A float module becomes a packed one in place: its class is swapped and its weight parameters are replaced. Names,
hooks, references, ties and other attributes stay, and the way back restores the very same class.

For a float parameter ``weight [..., N, K]`` a packed module has plain integer parameters (never trained, never cast):

    weight             [..., N, W]                         int32   packed codes
    weight_scale       [..., N, K // G]                    int16   bit patterns of bfloat16 scales
    weight_zero_point  [..., N, ceil(K // G * bits / 32)]  int32   packed zero points, asymmetric schemes only
    input_scale        [1]                                 int16   static activation scale, static schemes only
    weight_residual    [..., N, ceil(K / 8)]               int32   what rounding took, in sixteenths of a step from -7
                                                                   to 7, in 4 bits; residual schemes only

Beside a parameter called ``gate_up_proj`` stand ``gate_up_proj_scale``, ``gate_up_proj_zero_point``,
``gate_up_proj_input_scale`` and ``gate_up_proj_residual``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfquant.errors import KernelError
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.numerics.packing import PackedWeight, packed_length
from hfquant.schemes import LayerScheme, WeightScheme


@dataclass(frozen=True)
class FloatWeight:
    """The float parameter that packed ones stand for.

    Attributes:
        shape: ``(..., N, K)``, after any transposition.
        transposed: Whether the float module keeps it as ``(..., K, N)``.
    """

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def numel(self) -> int:
        """Weights it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def to_rows(self, parameter: Tensor) -> Tensor:
        """The float parameter as ``[..., N, K]``."""
        return parameter.transpose(-1, -2) if self.transposed else parameter

    def from_rows(self, rows: Tensor) -> Tensor:
        """Values ``[..., N, K]`` in the layout of the float parameter."""
        return rows.transpose(-1, -2).contiguous() if self.transposed else rows


NAN_SCALE_BITS = 0x7FC0
"""Bit pattern of a bfloat16 NaN, in int16."""


def companion_name(name: str, suffix: str) -> str:
    """Name of a parameter beside ``name``: ``scale``, ``zero_point``, ``input_scale``, ..."""
    return suffix if name == "weight" and suffix.startswith("input_") else f"{name}_{suffix}"


def packed_tensors(name: str, weight: FloatWeight, scheme: LayerScheme) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name, dtype and shape of every parameter that stands for the float parameter ``name``."""
    rows, bits = weight.shape[:-1], scheme.weight.bits
    groups = scheme.weight.groups(weight.in_features)
    tensors = {
        name: (torch.int32, torch.Size((*rows, packed_length(weight.in_features, bits)))),
        companion_name(name, "scale"): (torch.int16, torch.Size((*rows, groups))),
    }
    if not scheme.weight.symmetric:
        words = packed_length(groups, bits)
        tensors[companion_name(name, "zero_point")] = (torch.int32, torch.Size((*rows, words)))
    if scheme.activation is not None and not scheme.activation.dynamic:
        tensors[companion_name(name, "input_scale")] = (torch.int16, torch.Size((1,)))
    if scheme.residual:
        tensors[companion_name(name, "residual")] = (
            torch.int32,
            torch.Size((*rows, packed_length(weight.in_features, 4))),
        )
    return tensors


def keeping_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, but no cast to a narrower dtype: what trains keeps its precision through ``.to(bfloat16)``."""

    def apply(tensor: Tensor) -> Tensor:
        probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        return tensor.to(probe.device) if probe.dtype.itemsize < tensor.dtype.itemsize else fn(tensor)

    return apply


def packed_bytes(weight: FloatWeight, scheme: LayerScheme) -> int:
    """Bytes of all parameters that stand for ``weight``."""
    return sum(dtype.itemsize * size.numel() for dtype, size in packed_tensors("weight", weight, scheme).values())


LAYOUT = "_hfquant_layout"
"""Attribute of packed modules: their scheme, and the byte that stands for it in ops that take several layers."""


class PackedModule(nn.Module):
    """A module whose weights are packed; made by ``swap_`` from a float module, in place.

    Attributes:
        scheme: How its weights and activations are quantized.
        float_weights: Float parameter name -> what it was.
        float_class: The class before the swap.
        compute_dtype: Dtype of the float weights, which ``.to(dtype)`` changes.
        input_observer: While calibrating: called with the parameter name and the input of each product, which is
            then computed on unquantized activations.
        sqnr_db: Float parameter name -> signal to quantization noise ratio, where this process quantized it.
    """

    _is_hf_initialized = True  # Transformers must not initialise integer weights

    companion_suffixes: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "input_scale", "residual")

    scheme: LayerScheme
    float_weights: dict[str, FloatWeight]
    float_class: type[nn.Module]
    compute_dtype: torch.dtype
    input_observer: Callable[[str, Tensor], None] | None = None
    sqnr_db: dict[str, float]

    @classmethod
    def swap_(cls, module: nn.Module, scheme: LayerScheme) -> None:
        """Turn the float ``module`` into this class, with packed parameters on its device, not yet filled.

        Raises:
            SchemeError: If the group size does not divide K.
        """
        weights = cls.weights_of(module)
        first = next(iter(weights))
        device, dtype = module._parameters[first].device, module._parameters[first].dtype  # type: ignore[union-attr]
        parameters: dict[str, nn.Parameter | None] = {}
        for name, parameter in module._parameters.items():
            if name not in weights:
                parameters[name] = parameter
                continue
            for key, (kind, shape) in packed_tensors(name, weights[name], scheme).items():
                parameters[key] = nn.Parameter(_unfilled(kind, shape, device), requires_grad=False)
        module._parameters = parameters
        module.float_class, module.float_weights = type(module), weights  # type: ignore[assignment]
        module.scheme, module.compute_dtype = scheme, dtype  # type: ignore[assignment]
        module.sqnr_db = {}  # type: ignore[assignment]
        module.__class__ = cls

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, FloatWeight]:
        """The float parameters of ``module`` that this class packs."""
        raise NotImplementedError

    def restore_(self, dtype: torch.dtype | None = None) -> None:
        """Turn into the float module it was, with dequantized weights in ``dtype`` (default ``compute_dtype``)."""
        parameters: dict[str, nn.Parameter | None] = {}
        for name, parameter in self._parameters.items():
            if name in self.float_weights:
                rows = self.dequantize(name, dtype=dtype)
                parameters[name] = nn.Parameter(self.float_weights[name].from_rows(rows))
            elif name not in self.companions():
                parameters[name] = parameter
        float_class = self.float_class
        self._parameters = parameters
        for attribute in (
            "float_class",
            "float_weights",
            "scheme",
            "compute_dtype",
            "input_observer",
            "sqnr_db",
            LAYOUT,
        ):
            self.__dict__.pop(attribute, None)
        self.__class__ = float_class  # type: ignore[assignment]

    def companions(self) -> set[str]:
        """Names of the parameters that exist only because of quantization."""
        return {companion_name(name, suffix) for name in self.float_weights for suffix in self.companion_suffixes}

    def packed(self, name: str = "weight") -> PackedWeight:
        """The packed parameters that stand for the float parameter ``name``."""
        get = self._parameters.get
        weight, scale = get(name), get(companion_name(name, "scale"))
        assert weight is not None
        assert scale is not None
        return PackedWeight(weight, scale, get(companion_name(name, "zero_point")))

    @property
    def W_q(self) -> Tensor:
        """The codes, by the name that tells PEFT's DoRA to call ``dequantize()`` instead of reading ``weight``."""
        return self.packed().weight

    def packed_parameters(self, name: str = "weight") -> list[tuple[str, Tensor]]:
        """Names and tensors of ``packed(name)``, without those that the scheme does not have."""
        suffixed = zip(("", "scale", "zero_point"), self.packed(name), strict=True)
        return [(companion_name(name, s) if s else name, tensor) for s, tensor in suffixed if tensor is not None]

    def load_packed(self, packed: PackedWeight, name: str = "weight") -> None:
        """Take ``packed`` as the parameters that stand for the float parameter ``name``."""
        for suffix, tensor in zip(("", "scale", "zero_point"), packed, strict=True):
            if tensor is not None:
                key = companion_name(name, suffix) if suffix else name
                self._parameters[key] = nn.Parameter(tensor, requires_grad=False)

    def set_input_scale(self, scale_bits: Tensor, name: str = "weight") -> None:
        """Take ``scale_bits [1]`` (int16) as the static activation scale of ``name``; the scheme must be static."""
        self._parameters[companion_name(name, "input_scale")] = nn.Parameter(scale_bits, requires_grad=False)

    def beside(self, name: str, suffix: str) -> Tensor | None:
        """The parameter beside ``name``, if there is one."""
        return self._parameters.get(companion_name(name, suffix))

    def set_residual(self, residual: Tensor, name: str = "weight") -> None:
        """Take ``residual [..., N, W]`` (int32, packed with 4 bits) as what rounding took from ``name``."""
        self._parameters[companion_name(name, "residual")] = nn.Parameter(residual, requires_grad=False)

    def dequantize(self, name: str = "weight", *, dtype: torch.dtype | None = None) -> Tensor:
        """Float values ``[..., N, K]`` of the parameter ``name`` in ``dtype`` (default ``compute_dtype``)."""
        return dequantize_weight(
            *self.packed(name),
            bits=self.scheme.weight.bits,
            in_features=self.float_weights[name].in_features,
            dtype=dtype or self.compute_dtype,
        )

    def activation_arguments(self, x: Tensor, name: str = "weight") -> dict[str, Any]:
        """Arguments of the linear op that say how the input ``x`` of the parameter ``name`` is quantized.

        Raises:
            KernelError: If ``x`` is not ``[..., K]``; the op sees packed rows and could miss that.
        """
        in_features = self.float_weights[name].in_features
        if x.shape[-1] != in_features:
            raise KernelError(f"{type(self).__name__}.{name} takes rows of {in_features} values, not {x.shape[-1]}")
        if self.input_observer is not None:
            self.input_observer(name, x)
            return {}
        activation = self.scheme.activation
        if activation is None:
            return {}
        if activation.dynamic:
            return {"dynamic": True, "asymmetric": not activation.symmetric}
        return {"input_scale": self._parameters[companion_name(name, "input_scale")]}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        # Integers do not follow `.to(dtype)`, so the dtype of the results has to.
        device = next(p for p in self._parameters.values() if p is not None).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The float module's description, and the scheme."""
        original: Any = self.float_class.extra_repr
        return ", ".join(filter(None, (original(self), f"scheme={self.scheme}")))


def _unfilled(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Tensor:
    """A packed parameter before it is filled: scales are NaN, so that a forward gives NaN and not garbage."""
    if dtype == torch.int16:
        return torch.full(shape, NAN_SCALE_BITS, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def is_supported(weight: FloatWeight, scheme: WeightScheme) -> bool:
    """Whether the packed shape differs from the float one, so that neither is ever taken for the other."""
    return weight.numel > 0 and packed_length(weight.in_features, scheme.bits) != weight.in_features


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype of autocast where it is on, as the input of a float linear layer would be."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))

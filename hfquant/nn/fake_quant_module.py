"""What every module of quantization-aware training shares: float weights, and the grid they are rounded to.

A float module becomes one in place, by swapping its class. Its weights stay the very parameters they were, under their
names, so that ties, optimizers, checkpoints and resuming are those of the float model. Beside ``weight [..., N, K]``
stand, and are saved with it:

    weight_log_scale            [..., N, K // G]  float32  u: the scale is ``initial * exp(u)``, rounded to bfloat16
    weight_initial_scale        [..., N, K // G]  int32    bit patterns of the float32 scales that training started from
    weight_zero_point           [..., N, ...]     int32    packed zero points (asymmetric only); they do not train
    weight_input_log_scale      [1]               float32  u of the static activation scale, static schemes only
    weight_input_initial_scale  [1]               int32    the scale that was observed before training
    weight_lora_A, weight_lora_B  [..., R, K], [..., N, R]  float32  the adapter inside the rounding, if there is one

Bit patterns are int32 because neither gloo nor NCCL can send int16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.errors import KernelError
from hfquant.kernels.fake_quant_linear import GridWeight, learned_scale_from_bits
from hfquant.kernels.fake_quant_linear.reference import adapted_weight
from hfquant.nn.packed_module import FloatWeight, keeping_precision
from hfquant.numerics.affine import scale_from_bits, scale_to_bits
from hfquant.numerics.packing import PackedWeight, pack, unpack
from hfquant.numerics.residual import rounding_residual
from hfquant.numerics.straight_through import row_codes
from hfquant.schemes import LayerScheme


SUFFIXES = ("log_scale", "initial_scale", "zero_point", "input_log_scale", "input_initial_scale", "lora_A", "lora_B")
"""Of the parameters beside a weight."""

SHARED_SUFFIXES = SUFFIXES[:3]
"""Of those that modules with a tied weight share."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of a weight inside the rounding: ``weight + alpha / rank * B @ A``."""

    rank: int
    alpha: float


class FakeQuantModule(nn.Module):
    """A float module that computes with the values its weights will have when they are packed.

    Attributes:
        scheme: How its weights and activations will be quantized.
        float_weights: Float parameter name -> what it is.
        float_class: The class before the swap.
        compute_dtype: Dtype of the packed module's results; follows ``.to(dtype)``, which the weights do not.
        lora_factor: ``alpha / rank`` of its adapter.
        blend: Share of quantization in what it computes, from 0 to 1.
        bypassed: Compute with the float weights, without quantization and adapters.
        keeps_codes: Keep codes from one forward to the next, while no parameter changes, where that saves time.
        input_observer: While observing: called with the parameter name and the input of each product, which is then
            computed on unquantized activations.
    """

    scheme: LayerScheme
    float_weights: dict[str, FloatWeight]
    float_class: type[nn.Module]
    compute_dtype: torch.dtype
    lora_factor: float
    blend: float
    bypassed: bool
    keeps_codes: bool
    input_observer: Callable[[str, Tensor], None] | None
    _kept: dict[str, tuple[Any, Tensor, Tensor | None, Tensor]]

    @classmethod
    def swap_(
        cls,
        module: nn.Module,
        scheme: LayerScheme,
        weights: dict[str, FloatWeight],
        initial: Mapping[str, PackedWeight],
        adapter: Adapter | None = None,
    ) -> None:
        """Turn the float ``module`` into this class.

        Args:
            module: In memory; its parameters are kept.
            scheme: How it will be quantized.
            weights: Its weights.
            initial: Float parameter name -> packed weight with the scales to start from.
            adapter: Gives every weight an adapter, whose product is zero.
        """
        dtype = next(module._parameters[name] for name in weights).dtype  # type: ignore[union-attr]
        state = {"scheme": scheme, "float_weights": weights, "float_class": type(module), "compute_dtype": dtype}
        state |= {"lora_factor": adapter.alpha / adapter.rank if adapter else 1.0, "blend": 1.0, "bypassed": False}
        module.__dict__.update(state | {"keeps_codes": False, "input_observer": None, "_kept": {}})
        module.__class__ = cls
        assert isinstance(module, FakeQuantModule)
        for name, packed in initial.items():
            module._add_grid(name, packed, adapter)

    def _add_grid(self, name: str, packed: PackedWeight, adapter: Adapter | None) -> None:
        initial = scale_from_bits(packed.weight_scale)
        self._add(name, "log_scale", torch.zeros_like(initial))
        self._add(name, "initial_scale", initial.view(torch.int32))
        self._add(name, "zero_point", packed.weight_zero_point)
        if self.scheme.quantization_type == "static":
            self._add(name, "input_log_scale", initial.new_zeros(1))
            self._add(name, "input_initial_scale", initial.new_full((1,), torch.nan).view(torch.int32))
        if adapter is not None:
            *experts, rows, columns = self.float_weights[name].shape
            a = initial.new_empty(*experts, adapter.rank, columns)
            self._add(name, "lora_A", a.uniform_(-1, 1).mul_(columns**-0.5))
            self._add(name, "lora_B", initial.new_zeros(*experts, rows, adapter.rank))

    def _add(self, name: str, suffix: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            trains = tensor.is_floating_point()
            self._parameters[f"{name}_{suffix}"] = nn.Parameter(tensor, requires_grad=trains)

    def share_(self, owner: "FakeQuantModule") -> None:
        """Use the grid of ``owner``, whose weight this module shares."""
        for name in self.float_weights:
            for suffix in SHARED_SUFFIXES:
                if f"{name}_{suffix}" in owner._parameters:
                    self._parameters[f"{name}_{suffix}"] = owner._parameters[f"{name}_{suffix}"]

    def restore_(self) -> None:
        """Turn into the float module it was, with its float weights; adapters are left out."""
        own = {f"{name}_{suffix}" for name in self.float_weights for suffix in SUFFIXES}
        self._parameters = {name: p for name, p in self._parameters.items() if name not in own}
        float_class = self.float_class
        for attribute in FakeQuantModule.__annotations__:
            self.__dict__.pop(attribute, None)
        self.__class__ = float_class  # type: ignore[assignment]

    def beside(self, name: str, suffix: str) -> Tensor | None:
        """The parameter ``name_suffix``, if the scheme has it."""
        return self._parameters.get(f"{name}_{suffix}")

    def grid(self, name: str = "weight") -> GridWeight:
        """The weight ``name`` and its grid, as the training op takes them; codes if they are kept for it."""
        log_scale, a, b = (self.beside(name, suffix) for suffix in ("log_scale", "lora_A", "lora_B"))
        assert log_scale is not None
        weight = self.float_weights[name].to_rows(self._parameters[name])  # type: ignore[arg-type]
        in_one_pass = self.scheme.activation is None and weight.dtype == torch.float32  # sooner than from codes
        if in_one_pass or not self.keeps_codes or torch.compiler.is_compiling():
            return GridWeight(weight, log_scale, self.scale(name), self.zero_point(name), None, a, b)
        sources = [self._parameters[name], log_scale, a, b]
        version = [(id(t), t.data_ptr(), t._version) for t in sources if t is not None]
        kept = self._kept.get(name)
        if kept is None or kept[0] != version:
            scale, zero_point = self.scale(name), self.zero_point(name)
            kept = self._kept[name] = version, scale, zero_point, self.codes(name, scale, zero_point)
        return GridWeight(weight, log_scale, *kept[1:], a, b)

    def forget_codes(self) -> None:
        """Forget kept codes; for optimizers that change parameters behind autograd's back."""
        self._kept = {}

    def scale(self, name: str = "weight") -> Tensor:
        """Scales of the current state ``[..., N, K // G]``, float32."""
        initial, log_scale = self.beside(name, "initial_scale"), self.beside(name, "log_scale")
        assert initial is not None
        assert log_scale is not None
        return learned_scale_from_bits(initial, log_scale)

    def input_scale(self, name: str = "weight") -> Tensor | None:
        """Static activation scale of the current state ``[1]``, float32; ``None`` for other schemes."""
        initial, log_scale = self.beside(name, "input_initial_scale"), self.beside(name, "input_log_scale")
        return None if initial is None or log_scale is None else learned_scale_from_bits(initial, log_scale)

    def set_input_scale(self, scale: Tensor, name: str = "weight") -> None:
        """Start from the static activation ``scale [1]`` (float32); the scheme must be static."""
        parameter = self._parameters[f"{name}_input_initial_scale"]
        assert parameter is not None
        parameter.data.copy_(scale.view(torch.int32))

    def zero_point(self, name: str = "weight") -> Tensor | None:
        """Zero points ``[..., N, K // G]``, int8; ``None`` for symmetric schemes."""
        packed, scale = self.beside(name, "zero_point"), self.beside(name, "initial_scale")
        if packed is None or scale is None:
            return None
        return unpack(packed, bits=self.scheme.weight.bits, length=scale.shape[-1])

    @torch.no_grad()
    def codes(self, name: str = "weight", scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
        """Codes of the current state ``[..., N, K]``, int8."""
        adapted = self._adapted(name)
        scale = self.scale(name) if scale is None else scale
        zero_point = self.zero_point(name) if zero_point is None else zero_point
        return row_codes(adapted, scale, zero_point, bits=self.scheme.weight.bits)

    def _adapted(self, name: str) -> Tensor:
        """The weight that is rounded ``[..., N, K]``."""
        weight = self.float_weights[name].to_rows(self._parameters[name])  # type: ignore[arg-type]
        return adapted_weight(weight, self.beside(name, "lora_A"), self.beside(name, "lora_B"), self.lora_factor)

    @torch.no_grad()
    def residual(self, name: str = "weight") -> Tensor:
        """What rounding takes from the weight ``name``; see ``numerics/residual.py``."""
        return rounding_residual(self._adapted(name), self.packed(name), bits=self.scheme.weight.bits)

    def packed(self, name: str = "weight") -> PackedWeight:
        """The weight of the current state as it is deployed: the codes and scales that the forward computes with."""
        codes, zero_point = self.codes(name), self.beside(name, "zero_point")
        zero_point = None if zero_point is None else zero_point.detach().clone()
        return PackedWeight(pack(codes, bits=self.scheme.weight.bits), scale_to_bits(self.scale(name)), zero_point)

    def activation_arguments(self, x: Tensor, name: str = "weight") -> dict[str, Any]:
        """Arguments of the training op that say how the input ``x`` of the weight ``name`` is quantized.

        Raises:
            KernelError: If ``x`` is not ``[..., K]``.
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
        return {"input_log_scale": self.beside(name, "input_log_scale"), "input_scale": self.input_scale(name)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FakeQuantModule":
        # What trains keeps its precision through `.to(bfloat16)`; only the dtype of the results follows.
        device = next(p for p in self._parameters.values() if p is not None).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype

        self.forget_codes()
        super()._apply(keeping_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The float module's description, and the scheme it is trained for."""
        original: Any = self.float_class.extra_repr
        return ", ".join(filter(None, (original(self), f"training for scheme={self.scheme}")))

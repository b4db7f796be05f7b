"""What every module of quantized fine-tuning shares: a packed weight, and what trains on it.

A packed module becomes one in place, by swapping its class. The packed parameters stay as they were: they are what
training started from. Beside ``weight [..., N, W]`` stand

    weight_log_scale   [..., N, K // G]  float32  u: the scale is ``weight_scale * exp(u)``, rounded to bfloat16
    weight_residual    [..., N, W4]      int32    what rounding took from each weight, adapters inside the rounding only
    weight_lora_A      [..., R, K]       float32  the adapter inside the rounding
    weight_lora_B      [..., N, R]       float32
    input_log_scale    [1]               float32  u of the static activation scale, static schemes only

The codes of the current state are ``clamp(round(code + residual / 16 + alpha / rank * B @ A / weight_scale))``. Every
state is one of a packed model; ``packed`` gives it, and all that asks a packed module for its weight gets that.

While ``rounded`` is off a module computes with what is rounded there, and that packed model is not what it computes as.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfquant.errors import ConfigError
from hfquant.kernels.grid_linear import GridAdapter
from hfquant.kernels.grid_linear.reference import codes_now, lora_steps, scale_now
from hfquant.kernels.grid_weight.reference import unrounded_weight
from hfquant.nn.fake_quant_module import Adapter
from hfquant.nn.packed_module import PackedModule, companion_name, keeping_precision
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.packing import PackedWeight, pack, unpack
from hfquant.numerics.residual import sixteenths


TRAINED_SUFFIXES = ("log_scale", "lora_A", "lora_B", "input_log_scale")
"""Of the parameters that train."""

ADAPTER_SUFFIXES = ("_lora_A", "_lora_B")

NOT_ROUNDED = (
    "the weights are not rounded yet: the packed model would not be what was trained. Train on until "
    "adapter_delay_steps are over, or call round_anew(model, batches) of hfquant.hf.rounding"
)


class AdaptedModule(PackedModule):
    """A packed module that trains; made by ``adapt_`` from a packed one, in place.

    Attributes:
        packed_class: The class before the swap, which the merged module has again.
        lora_factor: ``alpha / rank`` of its adapter.
        rounded: Whether it computes with codes, and not with what an adapter makes of them before the rounding.
    """

    companion_suffixes: ClassVar[tuple[str, ...]] = (*PackedModule.companion_suffixes, *TRAINED_SUFFIXES)

    packed_class: type[PackedModule]
    lora_factor: float
    rounded: bool

    @classmethod
    def adapt_(cls, module: PackedModule) -> None:
        """Turn the packed ``module`` into this class, with scales that train."""
        module.__dict__.update({"packed_class": type(module), "lora_factor": 1.0, "rounded": True})
        module.__class__ = cls
        assert isinstance(module, AdaptedModule)
        for name in module.float_weights:
            module._add(name, "log_scale", torch.zeros(module._stored(name, "scale").shape))
            if module.scheme.quantization_type == "static":
                module._add(name, "input_log_scale", torch.zeros(1))

    def add_lora_(self, name: str, adapter: Adapter, residual: Tensor | None, generator: torch.Generator) -> None:
        """Give the weight ``name`` an adapter inside the rounding, whose product is zero.

        Args:
            name: Of the float parameter.
            adapter: Its rank, and how much it counts.
            residual: Packed residual ``[..., N, W4]`` (int32); ``None`` takes the one that PTQ kept.
            generator: Draws ``A``, evenly from ``-1 / sqrt(K)`` to ``1 / sqrt(K)``, as PEFT does.
        """
        if residual is not None:
            self.set_residual(residual.to(self._stored(name, "scale").device), name)
        *experts, rows, columns = self.float_weights[name].shape
        a = torch.empty(*experts, adapter.rank, columns).uniform_(-1, 1, generator=generator)
        self._add(name, "lora_A", a.mul_(columns**-0.5))
        self._add(name, "lora_B", torch.zeros(*experts, rows, adapter.rank))
        self.lora_factor = adapter.alpha / adapter.rank

    def _add(self, name: str, suffix: str, tensor: Tensor) -> None:
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        self._parameters[companion_name(name, suffix)] = nn.Parameter(
            tensor.to(self._stored(name, "scale").device, wide)
        )

    def _stored(self, name: str, suffix: str) -> Tensor:
        found = self.beside(name, suffix)
        assert found is not None
        return found

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that ``adapt_`` and ``add_lora_`` added to train."""
        names = {companion_name(name, suffix) for name in self.float_weights for suffix in TRAINED_SUFFIXES}
        return {name: p for name, p in self._parameters.items() if name in names and p is not None}

    def adapter(self, name: str = "weight") -> GridAdapter:
        """The weight ``name`` and what trains on it, as the training op takes them."""
        suffixes = ("scale", "zero_point", "log_scale", "residual", "lora_A", "lora_B")
        return GridAdapter(self._parameters[name], *(self.beside(name, s) for s in suffixes))  # type: ignore[arg-type]

    @torch.no_grad()
    def codes(self, name: str = "weight") -> Tensor:
        """Codes of the current state ``[..., N, K]``, int8."""
        return self._rounded(name)[0]

    def initial_codes(self, name: str = "weight") -> Tensor:
        """Codes that training started from ``[..., N, K]``, int8."""
        weight = self._parameters[name]
        assert weight is not None
        return unpack(weight, bits=self.scheme.weight.bits, length=self.float_weights[name].in_features)

    def _rounded(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Codes of the current state, and where the weight lies before the rounding, both ``[..., N, K]``.

        One expert at a time, as the forward does: a batched product may round differently.
        """
        adapter, length = self.adapter(name), self.float_weights[name].in_features
        if adapter.weight.ndim == 3:
            parts = [self._round_matrix(part, length) for part in adapter.unbind()]
            steps = [s for _, s in parts if s is not None]
            return torch.stack([codes for codes, _ in parts]), torch.stack(steps) if steps else None
        return self._round_matrix(adapter, length)

    def _round_matrix(self, adapter: GridAdapter, length: int) -> tuple[Tensor, Tensor | None]:
        bits = self.scheme.weight.bits
        delta = lora_steps(adapter.lora_a, adapter.lora_b, self.lora_factor, adapter.weight_scale)
        codes = codes_now(adapter.weight, adapter.residual, delta, bits=bits, length=length)
        if delta is None or not self.scheme.residual:
            return codes, None
        steps = delta.add_(unpack(adapter.weight, bits=bits, length=length))
        if adapter.residual is not None:
            steps.add_(unpack(adapter.residual, bits=4, length=length), alpha=1 / 16)
        return codes, steps

    @torch.no_grad()
    def packed(self, name: str = "weight") -> PackedWeight:
        """The weight of the current state as it is deployed: the codes and scales that the forward computes with."""
        scale = scale_to_bits(scale_now(self._stored(name, "scale"), self._stored(name, "log_scale")))
        zero_point = self.beside(name, "zero_point")
        words = pack(self.codes(name), bits=self.scheme.weight.bits)
        return PackedWeight(words, scale, None if zero_point is None else zero_point.detach())

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The parameters of the packed module that it computes as, by name; a bias stays what it is."""
        found: dict[str, Tensor] = {}
        for name in self.float_weights:
            found |= dict(self.packed_parameters(name))
            scale, log_scale = self.beside(name, "input_scale"), self.beside(name, "input_log_scale")
            if scale is not None and log_scale is not None:
                found[companion_name(name, "input_scale")] = scale_to_bits(scale_now(scale, log_scale))
            if self.scheme.residual:
                codes, steps = self._rounded(name)
                kept = self._stored(name, "residual")
                found[companion_name(name, "residual")] = kept if steps is None else sixteenths(steps - codes)
        return found

    @torch.no_grad()
    def unround_(self) -> None:
        """Turn into the float module whose weights are those before the rounding, in ``compute_dtype``.

        The parameters of the adapted module are left as they are; it is for who puts them back.
        """
        companions = self.companions()
        parameters = {name: p for name, p in self._parameters.items() if name not in companions}
        for name, weight in self.float_weights.items():
            rows = weight.from_rows(self._unrounded(name))
            parameters[name] = nn.Parameter(rows, requires_grad=False)
        self._parameters, self.__class__ = parameters, self.float_class  # type: ignore[assignment]

    def _unrounded(self, name: str) -> Tensor:
        """What rounding has not seen yet ``[..., N, K]``; one expert at a time, as the forward does."""
        adapter = self.adapter(name)
        parts = []
        for part in adapter.unbind() if adapter.weight.ndim == 3 else [adapter]:
            delta = lora_steps(part.lora_a, part.lora_b, self.lora_factor, part.weight_scale)
            assert delta is not None
            scale, bits = scale_now(part.weight_scale, part.log_scale), self.scheme.weight.bits
            grid = scale, part.weight_zero_point, bits
            parts.append(unrounded_weight(part.weight, part.residual, delta, *grid, self.compute_dtype))
        return torch.stack(parts) if adapter.weight.ndim == 3 else parts[0]

    @torch.no_grad()
    def start_anew_(self, packed: Mapping[str, Tensor]) -> None:
        """Train on from other codes, scales and residuals, with rounding on; adapters add nothing to them yet.

        Args:
            packed: By parameter name; copied into the parameters, which optimizers and DDP hold.
        """
        for name, tensor in packed.items():
            self._parameters[name].copy_(tensor)  # type: ignore[union-attr]
        for name in self.float_weights:
            for suffix in ("log_scale", "lora_B"):
                self._stored(name, suffix).zero_()
        self.rounded = True

    def merge_(self) -> None:
        """Turn into the packed module it computes as: no code changes.

        Raises:
            ConfigError: If it computes with weights that are not rounded.
        """
        if not self.rounded:
            raise ConfigError(NOT_ROUNDED)
        merged, own = self.merged(), self.companions() | set(self.float_weights)
        parameters = {name: p for name, p in self._parameters.items() if name not in own}
        packed_class = self.packed_class
        self._parameters = parameters | {n: nn.Parameter(t, requires_grad=False) for n, t in merged.items()}
        for attribute in ("packed_class", "lora_factor", "rounded"):
            self.__dict__.pop(attribute, None)
        self.__class__ = packed_class  # type: ignore[assignment]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """As ``nn.Module``; from the state of a packed module training starts again, at its codes and scales."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        packed = [name for name in self.float_weights if prefix + name in state_dict]
        for name in packed:
            if prefix + companion_name(name, "log_scale") in state_dict:
                continue
            for suffix in (*TRAINED_SUFFIXES, "residual"):
                key = prefix + companion_name(name, suffix)
                if key in missing:
                    missing.remove(key)
            for suffix in ("log_scale", "lora_B", "input_log_scale"):
                parameter = self._parameters.get(companion_name(name, suffix))
                if parameter is not None:
                    parameter.data.zero_()

    def activation_arguments(self, x: Tensor, name: str = "weight") -> dict[str, Any]:
        """As ``PackedModule.activation_arguments``; static scales train."""
        arguments = super().activation_arguments(x, name)
        if "input_scale" in arguments:
            arguments["input_log_scale"] = self.beside(name, "input_log_scale")
        return arguments

    def restore_(self, dtype: torch.dtype | None = None) -> None:
        """Turn into the float module, with the dequantized weights of the current state."""
        self.merge_()
        self.restore_(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedModule":
        parameters, trained = self._parameters, self.trained()
        self._parameters = {name: p for name, p in parameters.items() if name not in trained}
        super()._apply(fn, recurse)
        rest = self._parameters
        self._parameters = dict(trained)
        nn.Module._apply(self, keeping_precision(fn), recurse=False)
        found = rest | self._parameters
        self._parameters = {name: found[name] for name in parameters}
        return self

    def extra_repr(self) -> str:
        """The packed module's description, and what trains."""
        return f"{super().extra_repr()}, trains={', '.join(self.trained())}"

"""PEFT's LoRA layers on packed weights: they train as on float weights, and merge by rounding onto the grid.

Imports PEFT; ``hfquant/hf/peft.py`` imports this when a LoRA layer is made.
"""

import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hfquant.errors import ConfigError
from hfquant.finetune.side import MergeRecord, residual_values, round_onto_grid
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_linear import QuantLinear
from hfquant.numerics.residual import rounding_residual


KEPT = ("weight", "weight_residual", "bias")
"""Parameters of a base layer that merging changes, where it has them."""


class PackedLora(LoraLayer):
    """Merging of a LoRA layer whose base layer is packed; comes before PEFT's class.

    Codes before the merge are kept until the adapters are unloaded, so unmerging is exact, and adapters that are merged
    one after another are rounded once, as a sum.

    Attributes:
        before_merge: What unmerging restores.
        merge_record: What the last merge cost.
        layer_name: In the model, for errors.
    """

    layer_name: str = "layer"
    before_merge: dict[str, Tensor] | None = None
    merge_record: MergeRecord | None = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of one adapter, ``[N, K]``: PEFT's class, which comes after this one, has it."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return delta

    @property
    def fan_in_fan_out(self) -> bool:
        """Packed weights are ``[N, K]``, whatever the float layer was: a config made for ``Conv1D`` fits too."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        """PEFT sets what the config says; it does not apply here."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round the base weight plus the adapters' updates onto the grid, in place.

        Args:
            safe_merge: As in PEFT. Weights that are not finite are refused either way.
            adapter_names: Adapters to merge; ``None`` takes the active ones.

        Raises:
            SchemeError: If an adapter makes weights that are not finite.
            ConfigError: If an adapter has a bias and the layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_bias]
        if not names:
            return
        base = self._base()
        own = {name: base._parameters.get(name) for name in KEPT}
        before = self.before_merge or {name: p.data for name, p in own.items() if p is not None}
        on_device = {name: tensor.to(base.packed().weight.device) for name, tensor in before.items()}
        packed = base.packed()._replace(weight=on_device["weight"])
        bits, inputs = base.scheme.weight.bits, base.float_weights["weight"].in_features
        original = dequantize_weight(*packed, bits=bits, in_features=inputs, dtype=torch.float32)
        target, merged = original, (*self.merged_adapters, *names)
        for name in merged:
            target = self._with_adapter(target, original, name)
        residual = on_device.get("weight_residual")
        codes, record = round_onto_grid(packed, target, bits=bits, name=self.layer_name, residual=residual)
        after = {"weight": codes, "bias": self._merged_bias(on_device.get("bias"), merged)}
        if residual is not None:
            exact = target + residual_values(residual, packed.weight_scale, inputs).view(target.shape)
            after["weight_residual"] = rounding_residual(exact, packed._replace(weight=codes), bits=bits)
        self.before_merge, self.merge_record = before, record
        for name, tensor in after.items():
            if tensor is not None:
                base._parameters[name].data = tensor
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the codes from before the merge, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, before = self._base(), self.before_merge
        assert before is not None
        for name, tensor in before.items():
            base._parameters[name].data = tensor.to(base._parameters[name].device)
        self.before_merge = self.merge_record = None
        self.merged_adapters.clear()

    def _base(self) -> Any:
        return self.get_base_layer()

    @torch.no_grad()
    def _with_adapter(self, weight: Tensor, original: Tensor, name: str) -> Tensor:
        """``weight`` with one more adapter, as the unmerged layer computes it.

        DoRA (Liu et al. 2024, eq. 5, https://arxiv.org/abs/2402.09353) scales each row to its learned magnitude, and
        takes the norm of the weight that was there before any merge.
        """
        delta = self.get_delta_weight(name).float()
        if name not in self.lora_variant:
            return weight + delta
        magnitude: Any = self.lora_magnitude_vector[name]
        factor = magnitude.weight.float() / torch.linalg.norm(original + delta, dim=1)
        scaled: Tensor = factor.unsqueeze(-1) * (weight + delta)
        return scaled

    @torch.no_grad()
    def _merged_bias(self, bias: Tensor | None, names: tuple[str, ...]) -> Tensor | None:
        for name in names:
            if self.lora_bias[name]:
                if bias is None:
                    raise ConfigError(
                        f"adapter {name!r} has lora_bias=True and {self.layer_name} has no bias: "
                        "it cannot be merged; keep the adapter beside the weight"
                    )
                own: Any = self.lora_B[name]
                bias = bias + (own.bias * self.scaling[name]).to(bias.dtype)
        return bias


class PackedLoraLinear(PackedLora, Linear):
    """LoRA and DoRA on ``QuantLinear``."""


class PackedLoraEmbedding(PackedLora, Embedding):
    """LoRA on ``QuantEmbedding``."""


def packed_lora_layer(target: nn.Module, base: PackedModule, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    """The LoRA layer for ``target``, which is ``base`` or holds it.

    Raises:
        ConfigError: If no LoRA layer fits ``base``.
    """
    kinds = {QuantLinear: PackedLoraLinear, QuantEmbedding: PackedLoraEmbedding}
    kind = kinds.get(type(base))
    if kind is None:
        raise ConfigError(f"{type(base).__name__} takes no LoRA layer")
    layer: Any = kind(target, adapter_name, config=config, **kwargs)
    layer.layer_name = kwargs.get("target_name") or type(base).__name__
    return layer

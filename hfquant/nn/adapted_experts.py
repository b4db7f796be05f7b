"""Fused experts of quantized fine-tuning."""

from torch import Tensor

from hfquant.kernels.grid_linear import GridAdapter, grid_linear
from hfquant.nn.adapted_module import AdaptedModule
from hfquant.nn.packed_module import autocast_input
from hfquant.nn.quant_experts import QuantExperts, one_after_the_other


class AdaptedExperts(AdaptedModule, QuantExperts):
    """``QuantExperts`` whose scales train, and whose codes do if they have adapters."""

    _adapters: dict[str, list[GridAdapter]]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts; see ``QuantExperts.forward``."""
        # One unbind for all experts: its gradient is one stack, where indexing would fill the whole weight each time.
        self._adapters = {name: self.adapter(name).unbind() for name in self.float_weights}
        try:
            return QuantExperts.forward(self, hidden_states, top_k_index, top_k_weights)
        finally:
            self._adapters = {}

    def _linear(self, name: str, expert: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(expert, Tensor):
            return one_after_the_other(self, name, expert, x)
        x, bias = autocast_input(x), self._parameters.get(f"{name}_bias")
        return grid_linear(
            x,
            self._adapters[name][expert],
            bits=self.scheme.weight.bits,
            bias=None if bias is None else bias[expert],
            lora_factor=self.lora_factor,
            rounded=self.rounded,
            **self.activation_arguments(x, name),
        )

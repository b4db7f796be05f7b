"""Fused experts of quantization-aware training."""

from typing import Any

from torch import Tensor

from hfquant.kernels.fake_quant_linear import GridWeight, fake_quant_linear
from hfquant.nn.fake_quant_module import FakeQuantModule
from hfquant.nn.packed_module import autocast_input
from hfquant.nn.quant_experts import QuantExperts, one_after_the_other


class FakeQuantExperts(FakeQuantModule):
    """All experts of one layer, routed as ``QuantExperts`` routes them.

    A static activation range belongs to the layer, so an expert that saw no token has that of the others.
    """

    _grids: dict[str, list[GridWeight]]
    _expert = QuantExperts._expert
    _rows_in_use = QuantExperts._rows_in_use
    _sorted_by_expert = QuantExperts._sorted_by_expert

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts; see ``QuantExperts.forward``."""
        if self.bypassed:
            float_class: Any = self.float_class
            routing = () if top_k_index is None else (top_k_index, top_k_weights)
            return float_class.forward(self, hidden_states, *routing)  # type: ignore[no-any-return]
        # One unbind for all experts: its gradient is one stack, where indexing would fill the whole weight each time.
        self._grids = {name: self.grid(name).unbind() for name in self.float_weights}
        try:
            return QuantExperts.forward(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[arg-type]
        finally:
            self._grids = {}

    def _linear(self, name: str, expert: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(expert, Tensor):
            return one_after_the_other(self, name, expert, x)
        x, bias = autocast_input(x), self._parameters.get(f"{name}_bias")
        return fake_quant_linear(
            x,
            self._grids[name][expert],
            bits=self.scheme.weight.bits,
            bias=None if bias is None else bias[expert],
            lora_factor=self.lora_factor,
            blend=self.blend,
            **self.activation_arguments(x, name),
        )

"""The linear layer of quantized fine-tuning."""

from torch import Tensor

from hfquant.kernels.grid_linear import grid_linear
from hfquant.nn.adapted_module import AdaptedModule
from hfquant.nn.packed_module import autocast_input
from hfquant.nn.quant_linear import QuantLinear


class AdaptedLinear(AdaptedModule, QuantLinear):
    """``QuantLinear`` whose scales train, and whose codes do if it has an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [..., K]``; returns ``[..., N]`` in its dtype, or autocast's."""
        x = autocast_input(x)
        return grid_linear(
            x,
            self.adapter(),
            bits=self.scheme.weight.bits,
            bias=self.bias,
            lora_factor=self.lora_factor,
            rounded=self.rounded,
            **self.activation_arguments(x),
        )

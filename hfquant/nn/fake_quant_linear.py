"""The linear layer of quantization-aware training."""

from torch import Tensor, nn

from hfquant.kernels.fake_quant_linear import fake_quant_linear
from hfquant.nn.fake_quant_module import FakeQuantModule
from hfquant.nn.packed_module import autocast_input


class FakeQuantLinear(FakeQuantModule, nn.Linear):
    """``nn.Linear`` or ``Conv1D`` that computes what ``QuantLinear`` will, on the float weight it trains."""

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """K."""
        return self.float_weights["weight"].shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """N."""
        return self.float_weights["weight"].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [..., K]``; returns ``[..., N]``."""
        x = autocast_input(x)
        if self.bypassed:
            weight = self.float_weights["weight"].to_rows(self.weight).to(x.dtype)
            return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return fake_quant_linear(
            x,
            self.grid(),
            bits=self.scheme.weight.bits,
            bias=self.bias,
            lora_factor=self.lora_factor,
            blend=self.blend,
            **self.activation_arguments(x),
        )

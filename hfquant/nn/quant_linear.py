"""The linear layer on packed weights."""

from collections.abc import Callable

from torch import Tensor, nn

from hfquant.kernels import native
from hfquant.kernels.int4_linear import int4_linear
from hfquant.kernels.int8_linear import int8_linear
from hfquant.kernels.linear_op import ShortCut
from hfquant.nn.packed_module import FloatWeight, PackedModule, autocast_input


LINEAR_OPS: dict[int, Callable[..., Tensor]] = {4: int4_linear, 8: int8_linear}
"""The linear op for each number of bits."""

SHORT_CUTS = {4: ShortCut("int4_linear"), 8: ShortCut("int8_linear")}
"""The same op without checks that a packed module has made already."""

SAME_FORMULA = ("FalconLinear",)
"""Subclasses of ``nn.Linear`` in Transformers that compute the very same."""


class QuantLinear(PackedModule, nn.Linear):
    """``x @ weight.T + bias`` on a packed weight ``[N, K]``; stands for ``nn.Linear`` and Transformers' ``Conv1D``."""

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Whether ``module`` computes what this class computes; any other subclass of ``nn.Linear`` may not."""
        name = type(module).__name__
        is_linear = type(module) is nn.Linear or (isinstance(module, nn.Linear) and name in SAME_FORMULA)
        return is_linear or (name == "Conv1D" and hasattr(module, "nf"))

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, FloatWeight]:
        """The weight, as ``[N, K]``; ``Conv1D`` keeps it as ``[K, N]``."""
        shape = module.weight.shape
        assert isinstance(shape, tuple)
        if isinstance(module, nn.Linear):
            return {"weight": FloatWeight(tuple(shape))}
        return {"weight": FloatWeight(tuple(shape)[::-1], transposed=True)}

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """K."""
        return self.float_weights["weight"].shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """N."""
        return self.float_weights["weight"].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [..., K]``; returns ``[..., N]`` in its dtype, or autocast's."""
        get, activation, short_cut = self._parameters.get, self.scheme.activation, SHORT_CUTS[self.scheme.weight.bits]
        # Small layers take less time than a few properties and keyword arguments in Python, so decoding asks once.
        if (
            self.input_observer is None
            and "bias" in self._parameters  # not so where it is parametrized
            and x.size(-1) == self.float_weights["weight"].shape[1]
            and short_cut.takes(x, get("bias"))
        ):
            dynamic = activation is not None and activation.dynamic
            arguments = (get("weight"), get("weight_scale"), get("weight_zero_point"), get("input_scale"), get("bias"))
            asymmetric = dynamic and not activation.symmetric  # type: ignore[union-attr]
            precision = native.float32_precision() if activation is None else 0
            try:
                out: Tensor = short_cut.op(x, *arguments, dynamic, asymmetric, precision)
                return out
            except RuntimeError:  # layouts and groups that the kernels do not take
                pass
        x = autocast_input(x)
        return LINEAR_OPS[self.scheme.weight.bits](x, *self.packed(), bias=self.bias, **self.activation_arguments(x))

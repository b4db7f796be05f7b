"""One linear layer on a random grid, with oracles written from the definition and not from the package's formulas."""

from collections.abc import Callable

import torch
from torch import Tensor

from hfquant.kernels.int4_linear import int4_linear
from hfquant.kernels.int8_linear import int8_linear
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.packing import pack


OPS: dict[int, Callable[..., Tensor]] = {4: int4_linear, 8: int8_linear}
KINDS = ["weight_only", "dynamic", "dynamic-asym", "static"]
INTEGER_KINDS = KINDS[1:]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class LinearCase:
    """Random codes, scales and activations of one layer; ``x`` has an outlier and, from three rows on, a zero row."""

    def __init__(
        self,
        m: int,
        k: int,
        n: int,
        bits: int,
        group: int | None = None,
        symmetric: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        size = group or k
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        self.bits = bits
        self.codes = torch.randint(low, high, (n, k))
        self.scale = (torch.rand(n, k // size) * 0.05 + 0.01).bfloat16().double()
        if bits == 4 and symmetric:
            self.scale *= torch.where(torch.rand_like(self.scale) < 0.5, -1.0, 1.0)
        self.zero = None if symmetric else torch.randint(low, high, (n, k // size))
        self.x = torch.randn(m, k).to(dtype)
        self.x[:1, :1] = 30
        self.x[1:2] = self.x[1:2].abs()
        self.x[2:3] = 0
        self.bias = torch.randn(n).to(dtype)
        self.input_scale = torch.tensor([0.02]).bfloat16()
        shift = 0 if self.zero is None else self.zero.repeat_interleave(size, 1)
        self.weight = (self.codes - shift).double() * self.scale.repeat_interleave(size, 1)
        packed_zero = None if self.zero is None else pack(self.zero.to(torch.int8), bits=bits)
        self.packed = (pack(self.codes.to(torch.int8), bits=bits), scale_to_bits(self.scale.float()), packed_zero)

    def run(self, x: Tensor, kind: str, *, bias: Tensor | None = None) -> Tensor:
        """The op on ``x``."""
        return OPS[self.bits](x, *self.packed, bias=bias, **self.arguments(kind))

    def arguments(self, kind: str) -> dict[str, object]:
        """How the op is told to quantize activations."""
        if kind == "static":
            return {"input_scale": scale_to_bits(self.input_scale.float())}
        return {"dynamic": kind.startswith("dynamic"), "asymmetric": kind == "dynamic-asym"}

    def activation_codes(self, kind: str) -> tuple[Tensor, Tensor]:
        """Codes less zero points, and step of each row, in float64; quotients are formed in float32 by definition."""
        x = self.x.float()
        if kind == "dynamic-asym":
            low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
            step = (high - low) / 255
            step = torch.where(step == 0, 1.0, step)
            zero = -128 - (low / step).round()
            return ((x / step).round() + zero).clamp(-128, 127).double() - zero.double(), step.double()
        step = self.input_scale.float().expand(len(x), 1) if kind == "static" else x.abs().amax(-1, True) / 127
        step = torch.where(step == 0, 1.0, step)
        return (x / step).round().clamp(-128, 127).double(), step.double()

    def activations(self, kind: str) -> Tensor:
        """What the layer multiplies with, in float64."""
        if kind == "weight_only":
            return self.x.double()
        codes, step = self.activation_codes(kind)
        return codes * step

    def oracle(self, kind: str) -> Tensor:
        """The result in float64, with the bias."""
        return self.activations(kind) @ self.weight.t() + self.bias.double()

    def plain(self, kind: str) -> Tensor:
        """The same formula in the dtype of x."""
        weight = self.weight.to(self.x.dtype)
        return torch.nn.functional.linear(self.activations(kind).to(self.x.dtype), weight, self.bias)

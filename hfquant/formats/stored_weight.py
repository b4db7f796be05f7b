"""One quantized weight on its way from one file format to another."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hfquant.errors import SchemeError
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.nn.packed_module import FloatWeight
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.packing import PackedWeight, unpack
from hfquant.schemes import LayerScheme


Kind = Literal["linear", "head", "embedding", "experts"]


@dataclass(frozen=True)
class StoredWeight:
    """The packed tensors that stand for one float parameter.

    Attributes:
        name: Full name of the float parameter, as in ``model.layers.0.mlp.up_proj.weight``.
        kind: The kind of layer that owns it; a ``head`` is an output head or shares its table with an embedding.
        scheme: How weight and activations are quantized.
        float_weight: Shape ``(..., N, K)`` and orientation of the float parameter.
        packed: Codes, scales and zero points in the canonical layout (``numerics/packing.py``).
        input_scale: Bit pattern of the static activation scale ``[1]``, int16; static schemes only.
    """

    name: str
    kind: Kind
    scheme: LayerScheme
    float_weight: FloatWeight
    packed: PackedWeight
    input_scale: Tensor | None = None

    @property
    def module(self) -> str:
        """Name of the module that owns the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def codes(self) -> Tensor:
        """Signed codes ``[..., N, K]``, int8."""
        return unpack(self.packed.weight, bits=self.scheme.weight.bits, length=self.float_weight.in_features)

    @property
    def scale(self) -> Tensor:
        """Scales ``[..., N, K // G]``, float32."""
        return scale_from_bits(self.packed.weight_scale)

    @property
    def zero_point(self) -> Tensor | None:
        """Signed zero points ``[..., N, K // G]``, int8, or ``None``."""
        if self.packed.weight_zero_point is None:
            return None
        groups = self.packed.weight_scale.shape[-1]
        return unpack(self.packed.weight_zero_point, bits=self.scheme.weight.bits, length=groups)

    def scale_in(self, dtype: torch.dtype) -> Tensor:
        """The scales in ``dtype``, unchanged.

        Raises:
            SchemeError: If ``dtype`` cannot hold one of them exactly.
        """
        scale = self.scale
        cast = scale.to(dtype)
        wrong = scale[cast.float() != scale]
        if wrong.numel():
            raise SchemeError(
                f"{self.name}: {wrong.numel()} of {scale.numel()} scales (such as {float(wrong[0]):.6g}) have no exact "
                f"value in {str(dtype).removeprefix('torch.')}; export to compressed-tensors with dtype bfloat16 or "
                "float32, which holds all of them"
            )
        return cast

    def values(self, dtype: torch.dtype) -> Tensor:
        """The float parameter it stands for, in ``dtype`` and in the layout of the float model."""
        bits, length = self.scheme.weight.bits, self.float_weight.in_features
        return self.float_weight.from_rows(dequantize_weight(*self.packed, bits=bits, in_features=length, dtype=dtype))

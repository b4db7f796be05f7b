"""Round to nearest: the scale of each group comes from its largest magnitude alone."""

from torch import Tensor

from hfquant.numerics.affine import choose_scale, choose_scale_and_zero_point
from hfquant.schemes import WeightScheme


def choose_rtn(groups: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group.

    Args:
        groups: Weights ``[..., G]``, float32.
        scheme: Bits, and whether there is a zero point.

    Returns:
        Scale ``[...]`` float32 and zero point ``[...]`` int8, ``None`` for symmetric schemes.
    """
    if scheme.symmetric:
        return choose_scale(groups, bits=scheme.bits), None
    return choose_scale_and_zero_point(groups, bits=scheme.bits)

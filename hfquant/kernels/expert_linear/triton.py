"""All experts in one launch of the kernel for packed weights: a tile finds its expert from the row counts."""

from torch import Tensor

from hfquant.kernels.grid.triton import rows_of
from hfquant.kernels.packed_matmul.triton import packed_matmul
from hfquant.numerics.packing import PackedWeight


def expert_linear_triton(
    x: Tensor,
    expert_ends: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
) -> Tensor:
    """See ``hfquant.kernels.expert_linear.expert_linear``."""
    packed = PackedWeight(weight, weight_scale, zero_point)
    bias = None if bias is None else bias.contiguous()
    return packed_matmul(rows_of(x), packed, bits=bits, bias=bias, expert_ends=expert_ends.contiguous())

"""Data-free search (placeholder until measured)."""

from torch import Tensor

from hfquant.numerics.affine import round_scale
from hfquant.ptq.rtn import choose_rtn
from hfquant.schemes import WeightScheme


def choose_by_search(groups: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    if not scheme.symmetric or scheme.bits == 8:
        return choose_rtn(groups, scheme)
    index = groups.abs().argmax(-1, keepdim=True)
    return round_scale(groups.gather(-1, index).squeeze(-1) / -8), None

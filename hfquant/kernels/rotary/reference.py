"""Plain torch for ``rotary``."""

import torch
from torch import Tensor


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See ``hfquant.kernels.rotary.rotary``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turn(q), turn(k)

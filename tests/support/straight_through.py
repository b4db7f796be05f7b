"""Rounding and clipping as the formulas of gradients have them."""

import torch
from torch import Tensor

from hfquant.numerics.affine import code_range


def clipped(steps: Tensor, bits: int) -> Tensor:
    """``steps`` within the codes of ``bits``; the outermost have gradient 1, where torch 2.14's clamp has 0."""
    smallest, largest = code_range(bits)
    return torch.where((steps >= smallest) & (steps <= largest), steps, steps.detach().clamp(smallest, largest))

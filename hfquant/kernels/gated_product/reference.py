"""Plain torch for ``gated_product``."""

import torch
from torch import Tensor
from torch.nn import functional


APPROXIMATIONS = {1: "tanh", 2: "none"}
"""Of GELU, by the number of the activation; the one that is not here is SiLU."""


def gate_reference(gate: Tensor, kind: int) -> Tensor:
    """``act(gate)``."""
    return functional.gelu(gate, approximate=APPROXIMATIONS[kind]) if kind else functional.silu(gate)


def gate_backward_reference(grad: Tensor, gate: Tensor, kind: int) -> Tensor:
    """The gradient of ``gate`` from that of ``act(gate)``."""
    gelu, silu = torch.ops.aten.gelu_backward, torch.ops.aten.silu_backward
    out: Tensor = gelu(grad, gate, approximate=APPROXIMATIONS[kind]) if kind else silu(grad, gate)
    return out


def gated_product_reference(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    """See ``hfquant.kernels.gated_product.gated_product``."""
    acted = gate_reference(gate, kind)
    return acted if up is None else acted * up

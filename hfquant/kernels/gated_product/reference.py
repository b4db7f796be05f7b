"""Plain torch for ``gated_product``."""

from torch import Tensor
from torch.nn import functional


def gate_reference(gate: Tensor, kind: int) -> Tensor:
    """``act(gate)``: SiLU, or GELU by its approximation with tanh."""
    return functional.gelu(gate, approximate="tanh") if kind else functional.silu(gate)


def gated_product_reference(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """See ``hfquant.kernels.gated_product.gated_product``."""
    return gate_reference(gate, kind) * up

"""Plain torch for ``attention``."""

import torch
from torch import Tensor
from torch.nn import functional


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """See ``hfquant.kernels.attention.attention``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.size(1) // k.size(1)
    k, v = k.to(wide).repeat_interleave(group, 1), v.to(wide).repeat_interleave(group, 1)
    scores = q.to(wide) @ k.transpose(2, 3) * scale
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(sees_nothing, 0)
    return (weights @ v).to(q.dtype).transpose(1, 2).contiguous()


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, by torch's own attention, which keeps no scores."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        group = q.size(1) // k.size(1)
        queries, keys, values = leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:])
        out = functional.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, scale=scale)
    return torch.autograd.grad(out, leaves, grad.transpose(1, 2))

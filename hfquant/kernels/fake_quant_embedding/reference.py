"""Plain torch for ``fake_quant_embedding`` and its gradients."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from hfquant.numerics.straight_through import row_codes, row_values, weight_gradients


def fake_quant_embedding_reference(
    ids: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    padding_idx: int,
    bits: int,
    blend: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ``hfquant.kernels.fake_quant_embedding.fake_quant_embedding``."""
    rows, row_scale = embedding(ids, weight), embedding(ids, scale)
    shift = None if zero_point is None else embedding(ids, zero_point)
    values = row_values(row_codes(rows, row_scale, shift, bits=bits), row_scale, shift, dtype=dtype)
    return values if blend == 1.0 else torch.lerp(rows.to(dtype), values, blend)


def fake_quant_embedding_backward_reference(
    grad: Tensor,
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    padding_idx: int,
    bits: int,
    blend: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the whole table and of its ``u``; the padding row has none, as in ``nn.Embedding``."""
    ids = ids.flatten()
    rows = grad.reshape(ids.numel(), -1).to(torch.promote_types(weight.dtype, torch.float32))
    rows = rows * (ids != padding_idx).unsqueeze(-1)
    shift = None if zero_point is None else zero_point[ids]
    grad_rows, grad_scale = weight_gradients(rows, weight[ids], scale[ids], shift, bits=bits, blend=blend)
    table = rows.new_zeros(weight.shape).index_add_(0, ids, grad_rows)
    return table.to(weight.dtype), rows.new_zeros(scale.shape).index_add_(0, ids, grad_scale.to(rows.dtype))

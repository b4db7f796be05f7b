"""INT8 codes of activations, with one scale per row."""

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native, register_triton
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference


def _fake(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


define_op("quantize_rows(Tensor x, Tensor? scale) -> (Tensor, Tensor)", reference=quantize_rows_reference, fake=_fake)
register_native("quantize_rows", lambda x, scale: x.dtype in native.FLOATS and x.shape[-1] > 0)
register_triton("quantize_rows")


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 codes of each row of ``x`` and the scale they are in.

    Args:
        x: Activations ``[M, K]``, any floating dtype.
        scale: Static scale ``[1]``, float32, positive; ``None`` takes ``absmax / 127`` of each row.

    Returns:
        Codes ``[M, K]`` int8 and scales ``[M, 1]`` float32. The scale of a row that holds NaN is NaN, as is that of
        a row with an infinity when the scale is dynamic; with a static scale infinities saturate.
    """
    codes, row_scale = torch.ops.hfquant.quantize_rows(x, scale)
    return codes, row_scale

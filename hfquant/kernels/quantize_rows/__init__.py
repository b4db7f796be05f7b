"""INT8 codes of activations, with one scale and, where wanted, one zero point per row."""

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dispatch import define_op, register_native, register_triton
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference


def _fake(x: Tensor, scale: Tensor | None, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*x.shape[:-1], 1)
    codes, row_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    return codes, row_scale, x.new_empty(rows, dtype=torch.int8)


define_op(
    "quantize_rows(Tensor x, Tensor? scale, bool asymmetric) -> (Tensor, Tensor, Tensor)",
    reference=quantize_rows_reference,
    fake=_fake,
)
register_native("quantize_rows", lambda x, scale, asymmetric: x.dtype in native.FLOATS and x.shape[-1] > 0)
register_triton("quantize_rows")


def quantize_rows(x: Tensor, scale: Tensor | None = None, *, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 codes of each row of ``x``, the scale they are in and the code of zero.

    Args:
        x: Activations ``[M, K]``, any floating dtype.
        scale: Static scale ``[1]``, float32, positive; ``None`` takes ``absmax / 127`` of each row.
        asymmetric: Without a static scale: span the range of each row, zero included, in 255 steps.

    Returns:
        Codes ``[M, K]`` int8, scales ``[M, 1]`` float32 and zero points ``[M, 1]`` int8, 0 if symmetric. The scale of
        a row that holds NaN is NaN, and not finite for an infinity when the scale is dynamic; with a static scale
        infinities saturate.
    """
    codes, row_scale, zero_point = torch.ops.hfquant.quantize_rows(x, scale, asymmetric)
    return codes, row_scale, zero_point

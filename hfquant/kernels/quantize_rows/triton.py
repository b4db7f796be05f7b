"""INT8 codes of activations in Triton: the codes and scales are the reference's, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.grid.triton import clamp_codes, round_half_even, rows_of


WHOLE, COLUMNS = 8192, 2048
"""The longest row that a program reads once and holds; of longer ones it holds this many values at a time."""


@triton.jit
def _codes(x, scale, zero):
    steps = round_half_even(tl.div_rn(x, scale)) + zero
    return tl.where(steps == steps, clamp_codes(steps, 8), 0.0).to(tl.int8)


@triton.jit
def quantize_rows_kernel(
    x_ptr, static_ptr, codes_ptr, scale_ptr, zero_ptr, K, ASYMMETRIC: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """One program a row: its range, then its codes; a second read, unless ``ONCE``, comes from the cache."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    if ONCE:
        x = tl.load(x_ptr + row * K + columns, mask=columns < K, other=0).to(tl.float32)
        low, high, bad = tl.minimum(x, 0.0), tl.maximum(x, 0.0), (x != x).to(tl.int32)
    else:
        low, high, bad = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.int32)
        for start in range(0, K, BK):
            x = tl.load(x_ptr + row * K + start + columns, mask=start + columns < K, other=0).to(tl.float32)
            low, high, bad = tl.minimum(low, x), tl.maximum(high, x), bad | (x != x).to(tl.int32)
    lowest, highest, zero = tl.min(low, 0), tl.max(high, 0), 0.0
    if static_ptr is not None:
        scale = tl.load(static_ptr)
    elif ASYMMETRIC:
        scale = tl.div_rn(highest - lowest, 255.0)
        scale = tl.where(scale == 0, 1.0, scale)
        zero = clamp_codes(-128.0 - round_half_even(tl.div_rn(lowest, scale)), 8)
        zero = tl.where(zero == zero, zero, 0.0)
    else:
        scale = tl.div_rn(tl.maximum(highest, -lowest), 127.0)
        scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.where(tl.max(bad, 0) > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    zero = tl.where(tl.max(bad, 0) > 0, 0.0, zero)
    tl.store(zero_ptr + row, tl.cast(zero, tl.float32).to(tl.int8))
    if ONCE:
        tl.store(codes_ptr + row * K + columns, _codes(x, scale, zero), mask=columns < K)
    else:
        for start in range(0, K, BK):
            inside = start + columns < K
            x = tl.load(x_ptr + row * K + start + columns, mask=inside, other=0).to(tl.float32)
            tl.store(codes_ptr + row * K + start + columns, _codes(x, scale, zero), mask=inside)


def quantize_rows_triton(x: Tensor, scale: Tensor | None, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """See ``hfquant.kernels.quantize_rows.quantize_rows``."""
    rows, k = rows_of(x), x.shape[-1]
    codes = torch.empty_like(rows, dtype=torch.int8)
    row_scale, zero_point = (rows.new_empty((rows.shape[0], 1), dtype=d) for d in (torch.float32, torch.int8))
    if not rows.numel():
        zero_point.zero_()
        row_scale.copy_(scale if scale is not None else torch.ones_like(row_scale))
    else:
        once = k <= WHOLE
        block = triton.next_power_of_2(k) if once else COLUMNS
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(rows.shape[0],)](
                rows, scale, codes, row_scale, zero_point, k, ASYMMETRIC=asymmetric, BK=block,
                ONCE=once, num_warps=max(1, min(4, block // 512)),
            )  # fmt: skip
    return codes.view(x.shape), row_scale.view(*x.shape[:-1], 1), zero_point.view(*x.shape[:-1], 1)

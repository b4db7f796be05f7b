"""INT8 codes of activations in Triton: the codes and scales are the reference's, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.grid.triton import clamp_codes, round_half_even, rows_of


@triton.jit
def quantize_rows_kernel(x_ptr, static_ptr, codes_ptr, scale_ptr, K, BK: tl.constexpr):
    """One program a row: its largest magnitude, then its codes; the second read comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BK)
    largest, bad = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.int32)
    for start in range(0, K, BK):
        x = tl.load(x_ptr + row * K + start + columns, mask=start + columns < K, other=0).to(tl.float32)
        largest, bad = tl.maximum(largest, tl.abs(x)), bad | (x != x).to(tl.int32)
    if static_ptr is None:
        absmax = tl.max(largest, 0)
        scale = tl.where(absmax == 0, 1.0, tl.div_rn(absmax, 127.0))
    else:
        scale = tl.load(static_ptr)
    scale = tl.where(tl.max(bad, 0) > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, BK):
        inside = start + columns < K
        x = tl.load(x_ptr + row * K + start + columns, mask=inside, other=0).to(tl.float32)
        steps = round_half_even(tl.div_rn(x, scale))
        codes = tl.where(steps == steps, clamp_codes(steps, 8), 0.0)
        tl.store(codes_ptr + row * K + start + columns, codes.to(tl.int8), mask=inside)


def quantize_rows_triton(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``hfquant.kernels.quantize_rows.quantize_rows``."""
    rows, k = rows_of(x), x.shape[-1]
    codes = torch.empty_like(rows, dtype=torch.int8)
    row_scale = rows.new_ones((rows.shape[0], 1), dtype=torch.float32)
    if not rows.numel() and scale is not None:
        row_scale = row_scale * scale
    if rows.numel():
        block = min(triton.next_power_of_2(k), 8192)
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(rows.shape[0],)](
                rows, scale, codes, row_scale, k, BK=block, num_warps=max(1, min(8, block // 512))
            )
    return codes.view(x.shape), row_scale.view(*x.shape[:-1], 1)

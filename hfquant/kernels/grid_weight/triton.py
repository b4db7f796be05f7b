"""The grid adapter's weight in Triton, forward and backward; the codes are the reference's, bit for bit."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.grid.triton import clamp_codes, round_half_even, unpack_words


WORDS = 256
"""Words of one program: 2048 weights."""


@triton.jit
def _steps(codes_ptr, residual_ptr, delta_ptr, word, mask):
    """Steps before clipping ``[BG, BW, 8]`` of the words numbered ``word [BG, BW]``, and where their weights are."""
    steps = unpack_words(tl.load(codes_ptr + word, mask=mask, other=0), 4).to(tl.float32)
    if residual_ptr is not None:
        steps += unpack_words(tl.load(residual_ptr + word, mask=mask, other=0), 4).to(tl.float32) * 0.0625
    at = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    whole = mask[:, :, None] & (at >= 0)
    delta = tl.load(delta_ptr + at, mask=whole, other=0).to(tl.float32)
    return round_half_even(steps + delta), at, whole


@triton.jit
def grid_weight_kernel(
    codes_ptr, residual_ptr, delta_ptr, s_ptr, out_ptr, GROUPS, GROUP_WORDS, BG: tl.constexpr, BW: tl.constexpr
):
    """``BG`` groups, ``BW`` words of each at a time."""
    group = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    scale = tl.load(s_ptr + group, mask=group < GROUPS, other=1.0)[:, None, None]
    for start in range(0, GROUP_WORDS, BW):
        word = start + tl.arange(0, BW)[None, :]
        mask = (group < GROUPS)[:, None] & (word < GROUP_WORDS)
        steps, at, whole = _steps(codes_ptr, residual_ptr, delta_ptr, group[:, None] * GROUP_WORDS + word, mask)
        tl.store(out_ptr + at, (clamp_codes(steps, 4) * scale).to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def grid_weight_backward_kernel(
    grad_ptr, codes_ptr, residual_ptr, delta_ptr, s_ptr, grad_delta_ptr, grad_s_ptr, GROUPS, GROUP_WORDS,
    BG: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Codes are computed again; each group's scale gradient is summed by one program, in a fixed order."""
    group = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    scale = tl.load(s_ptr + group, mask=group < GROUPS, other=1.0)[:, None, None]
    total = tl.zeros((BG, BW, 8), tl.float32)
    for start in range(0, GROUP_WORDS, BW):
        word = start + tl.arange(0, BW)[None, :]
        mask = (group < GROUPS)[:, None] & (word < GROUP_WORDS)
        steps, at, whole = _steps(codes_ptr, residual_ptr, delta_ptr, group[:, None] * GROUP_WORDS + word, mask)
        grad = tl.load(grad_ptr + at, mask=whole, other=0).to(tl.float32)
        codes = clamp_codes(steps, 4)
        grad_delta = tl.where(codes == steps, grad * scale, 0.0)
        tl.store(grad_delta_ptr + at, grad_delta.to(grad_delta_ptr.dtype.element_ty), mask=whole)
        total += grad * codes
    tl.store(grad_s_ptr + group, tl.sum(tl.sum(total, 2), 1), mask=group < GROUPS)


def _launch(kernel: Any, pointers: list[Tensor | None], delta: Tensor, groups: int) -> None:
    words = delta.numel() // groups // 8
    block = min(triton.next_power_of_2(words), WORDS)
    together = WORDS // block
    with torch.cuda.device_of(delta):
        kernel[(triton.cdiv(groups, together),)](
            *pointers, groups, words, BG=together, BW=block, num_warps=4, enable_fp_fusion=False
        )


def grid_weight_triton(
    codes: Tensor,
    residual: Tensor | None,
    delta: Tensor,
    scale: Tensor,
    zero_point: None,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """See ``hfquant.kernels.grid_weight.grid_weight``."""
    delta, scale = delta.contiguous(), scale.contiguous()
    out = torch.empty_like(delta, dtype=dtype)
    if out.numel():
        residual = None if residual is None else residual.contiguous()
        _launch(grid_weight_kernel, [codes.contiguous(), residual, delta, scale, out], delta, scale.numel())
    return out


def grid_weight_backward_triton(
    grad: Tensor, codes: Tensor, residual: Tensor | None, delta: Tensor, scale: Tensor, zero_point: None, bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``delta`` and ``scale``; see ``hfquant.kernels.grid_weight.grid_weight``."""
    delta, scale = delta.contiguous(), scale.contiguous()
    grad_delta, grad_scale = torch.empty_like(delta), torch.zeros_like(scale)
    if delta.numel():
        residual = None if residual is None else residual.contiguous()
        pointers = [grad.contiguous(), codes.contiguous(), residual, delta, scale, grad_delta, grad_scale]
        _launch(grid_weight_backward_kernel, pointers, delta, scale.numel())
    return grad_delta, grad_scale

"""Exact products of INT8 codes, on whatever torch offers for them."""

import torch
from torch import Tensor


EXACT_FLOAT_BLOCK = 1024
"""Inputs per float32 product: 1024 * 128 * 128 = 2**24, the last integer float32 counts to without a gap."""

EXACT_INT32_BLOCK = 1 << 16
"""Inputs per int32 product: 2**16 * 128 * 128 = 2**30 stays within int32."""


def integer_matmul(a: Tensor, b: Tensor, a_zero_point: Tensor | None = None) -> Tensor:
    """``(a - a_zero_point) @ b.T`` of INT8 codes ``[M, K]`` and ``[N, K]``, exact, as float32 ``[M, N]``.

    Sums beyond 2**24 are rounded once, when the exact integer becomes float32.
    """
    if a.numel() == 0 or b.numel() == 0:
        return a.new_zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    block = EXACT_INT32_BLOCK if _has_fast_int_mm(a) else EXACT_FLOAT_BLOCK
    total: Tensor | None = None
    for part_a, part_b in zip(a.split(block, -1), b.split(block, -1), strict=True):
        part = torch._int_mm(part_a, part_b.t()) if block == EXACT_INT32_BLOCK else _float_block(part_a, part_b)
        total = part if total is None else total.to(torch.int64) + part
    assert total is not None
    if a_zero_point is not None:
        total = total.to(torch.int64) - a_zero_point * b.sum(-1, dtype=torch.int64)
    return total.float()


def _float_block(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float().t()).to(torch.int32)


def _has_fast_int_mm(a: Tensor) -> bool:
    # Without AVX-512 torch._int_mm runs a scalar loop on a CPU, without VNNI oneDNN adds pairs of products in int16,
    # which saturates, and with K = 1 it misreads strides; on CUDA it refuses M <= 16 and odd sizes.
    return (
        a.device.type == "cpu"
        and a.shape[-1] > 1
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_vnni_supported()
    )

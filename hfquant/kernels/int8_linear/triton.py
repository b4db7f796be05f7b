"""The INT8 linear layer in Triton: integer activations and weights with one scale a row meet in integer arithmetic."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.grid.triton import INTERPRETED, processors, rows_of, signed_codes
from hfquant.kernels.int4_linear.triton import QuantizedRows, float_matmul, quantize_activations
from hfquant.kernels.packed_matmul.triton import SLICES
from hfquant.numerics.packing import PackedWeight


SUMMED_ROWS = 256
"""Rows beyond which the sums of the weight's rows get a launch of their own: every tile would find them again."""


@triton.jit
def _without_zero(acc, sums, zx_ptr, token):
    """Sums ``[BN, BM]`` of products with codes, less the zero points of the rows times the sums of weights ``[BN]``.

    In a kernel, those come from a product with 16 columns of ones: adding up outside tensor cores costs an instruction
    a weight.
    """
    return acc - sums[:, None] * tl.load(zx_ptr + token).to(tl.int32)[None, :]


@triton.jit
def _store_scaled(acc, sw_ptr, sx_ptr, bias_ptr, out_ptr, n, m, row, token, M, N):
    """``acc * scale_w * scale_x + bias`` of int32 ``[BN, BM]``, in the order of the reference."""
    out = acc.to(tl.float32) * tl.load(sw_ptr + row).to(tl.float32)[:, None] * tl.load(sx_ptr + token)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    at = out_ptr + token[None, :] * N + n[:, None]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def int8_few_rows_kernel(
    x_ptr, w_ptr, sw_ptr, sx_ptr, zx_ptr, bias_ptr, out_ptr, M, N, K, WIDTH,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """``S`` warps share a tile and take ``BK`` inputs each, as in ``packed_matmul``; int32 sums are exact."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    row, token = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    k = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    w_at, x_at = w_ptr + row[None, :, None] * WIDTH + k, x_ptr + token[None, :, None] * K + k
    acc, sums = tl.zeros((S, BN, BM), tl.int32), tl.zeros((S, BN, 16), tl.int32)
    for i in tl.range(0, tl.cdiv(K, S * BK), num_stages=STAGES):
        if EVEN:
            w, x = tl.load(w_at + i * (S * BK)), tl.load(x_at + i * (S * BK))
        else:
            w = tl.load(w_at + i * (S * BK), mask=i * (S * BK) + k < WIDTH, other=0)
            x = tl.load(x_at + i * (S * BK), mask=i * (S * BK) + k < K, other=0)
        acc = tl.dot(signed_codes(w, ASM), tl.trans(x, 0, 2, 1), acc, out_dtype=tl.int32)
        if zx_ptr is not None:
            ones = tl.full((S, BK, 16), 1, tl.int8)
            if not EVEN:
                ones = tl.broadcast_to((i * (S * BK) + tl.trans(k, 0, 2, 1) < K).to(tl.int8), (S, BK, 16))
            sums = tl.dot(signed_codes(w, ASM, SWAP=True), ones, sums, out_dtype=tl.int32)
    total = tl.sum(acc, 0)
    if zx_ptr is not None:
        total = _without_zero(total, tl.max(tl.sum(sums, 0), 1), zx_ptr, token)
    _store_scaled(total, sw_ptr, sx_ptr, bias_ptr, out_ptr, n, m, row, token, M, N)


@triton.jit
def weight_sums_kernel(w_ptr, sums_ptr, WIDTH, K, BK: tl.constexpr):
    """Sums of the codes of each row of the weight, one program a row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BK,), tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        codes = tl.load(w_ptr + row * WIDTH + k, mask=k < K, other=0) ^ -128
        total += tl.where(k < K, codes.to(tl.int32), 0)  # other=-128 would do, but Triton 3.6 fills only every fourth
    tl.store(sums_ptr + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["M"])
def int8_many_rows_kernel(
    x_ptr, w_ptr, sw_ptr, sx_ptr, zx_ptr, sums_ptr, bias_ptr, out_ptr, M, N, K, WIDTH,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One tile a program; bands of ``BAND`` tiles of outputs share rows of x in the L2 cache."""
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = tl.program_id(0) // (BAND * tiles_m)
    height = tl.minimum(tiles_n - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * tiles_m)
    n = (band * BAND + inside % height) * BN + tl.arange(0, BN)
    m = inside // height * BM + tl.arange(0, BM)
    row, token, k = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64), tl.arange(0, BK)
    w_at, x_at = w_ptr + row[:, None] * WIDTH + k[None, :], x_ptr + token[None, :] * K + k[:, None]
    acc, sums = tl.zeros((BN, BM), tl.int32), tl.zeros((BN, 16), tl.int32)
    for i in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        if EVEN:
            w, x = tl.load(w_at + i * BK), tl.load(x_at + i * BK)
        else:
            w = tl.load(w_at + i * BK, mask=i * BK + k[None, :] < WIDTH, other=0)
            x = tl.load(x_at + i * BK, mask=i * BK + k[:, None] < K, other=0)
        acc = tl.dot(signed_codes(w, ASM), x, acc, out_dtype=tl.int32)
        if zx_ptr is not None and sums_ptr is None:
            ones = tl.full((BK, 16), 1, tl.int8)
            if not EVEN:
                ones = tl.broadcast_to((i * BK + k[:, None] < K).to(tl.int8), (BK, 16))
            sums = tl.dot(signed_codes(w, ASM, SWAP=True), ones, sums, out_dtype=tl.int32)
    if sums_ptr is not None:
        acc = _without_zero(acc, tl.load(sums_ptr + row), zx_ptr, token)
    elif zx_ptr is not None:
        acc = _without_zero(acc, tl.max(sums, 1), zx_ptr, token)
    _store_scaled(acc, sw_ptr, sx_ptr, bias_ptr, out_ptr, n, m, row, token, M, N)


def int8_matmul(activations: QuantizedRows, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``((codes - zero_point) @ weight codes.T) * weight_scale * row_scale + bias``, as ``[M, N]`` in ``dtype``.

    Args:
        activations: Of ``[M, K]``.
        packed: INT8 weight ``[N, K]`` with one scale a row and no zero point.
        bias: ``[N]``.
        dtype: Of the result.
    """
    codes, row_scale, row_zero = activations
    (m, k), n = codes.shape, packed.weight.shape[0]
    out = codes.new_empty((m, n), dtype=dtype)
    weight, scale = packed.weight.contiguous().view(torch.int8), packed.weight_scale.contiguous().view(torch.bfloat16)
    kernel, tile, warps = choose_kernel(n, m, k, codes.device, asymmetric=row_zero is not None)
    grid: tuple[int, ...] = (triton.cdiv(n, tile["BN"]), triton.cdiv(m, tile["BM"]))
    arguments = [codes, weight, scale, row_scale, row_zero]
    with torch.cuda.device_of(codes):
        if kernel is int8_many_rows_kernel:
            grid = (grid[0] * grid[1],)
            arguments.append(None if row_zero is None or m <= SUMMED_ROWS else weight_sums(weight, k))
        # Without fusion of products and sums the bias is added to what the reference adds it to.
        kernel[grid](
            *arguments, bias, out, m, n, k, weight.shape[-1], ASM=not INTERPRETED, **tile, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def weight_sums(weight: Tensor, k: int) -> Tensor:
    """Sums over the first ``k`` codes of each row of a stored INT8 weight ``[N, bytes]``: ``[N]``, int32."""
    sums = weight.new_empty(weight.shape[0], dtype=torch.int32)
    block = min(triton.next_power_of_2(k), 2048)
    weight_sums_kernel[(weight.shape[0],)](weight, sums, weight.shape[-1], k, BK=block, num_warps=4)
    return sums


MANY_ROWS = ((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (64, 64, 256, 4, 3), (64, 32, 256, 4, 3))
"""Outputs, rows and inputs of a tile, warps, stages: the first that gives each processor work is the fastest."""


def choose_kernel(
    n: int, m: int, k: int, device: torch.device, *, asymmetric: bool = False
) -> tuple[Any, dict[str, int | bool], int]:
    """Kernel, tile and warps for ``m`` rows and ``n`` outputs, measured on an H200 (benchmarks/gpu_tiles.py).

    No tile spills or exceeds any target's memory (tests/kernels/test_triton_compile.py).
    """
    count, tiles = processors(device), lambda bn, bm: -(-n // bn) * -(-m // bm)
    if m <= 16 or (m <= 64 and tiles(64, 32) < count):
        bm = 8 if m <= 8 else 16 if m <= 16 else 64 if m > 32 and tiles(32, 64) >= 3 * count // 4 else 32
        bn = 32 if bm == 64 else 64
        while bn > 16 and tiles(bn, bm) < 3 * count // 4:
            bn //= 2
        even = k % (SLICES * 128) == 0
        stages = 2 if asymmetric and bm >= 32 else 3  # ones for the sums of weights take shared memory too
        return int8_few_rows_kernel, {"S": SLICES, "BN": bn, "BM": bm, "BK": 128, "STAGES": stages, "EVEN": even}, 4
    fitting = [tile for tile in MANY_ROWS if tile[1] < 2 * m]
    bn, bm, bk, warps, stages = next((t for t in fitting if tiles(t[0], t[1]) >= 3 * count // 2), fitting[-1])
    tile = {"BN": bn, "BM": bm, "BK": bk, "BAND": 8, "STAGES": stages, "EVEN": k % bk == 0}
    return int8_many_rows_kernel, tile, warps


def int8_linear_triton(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    asymmetric: bool,
    precision: int = 0,
) -> Tensor:
    """See ``hfquant.kernels.int8_linear.int8_linear``."""
    rows, packed = rows_of(x), PackedWeight(weight, weight_scale, zero_point)
    activations = None
    if dynamic or input_scale is not None:
        activations = quantize_activations(rows, input_scale, asymmetric)
    if activations is not None and weight_scale.shape[-1] == 1 and zero_point is None:
        out = int8_matmul(activations, packed, bias, x.dtype)
    else:
        out = float_matmul(rows, activations, packed, bias, bits=8)
    return out.view(*x.shape[:-1], weight.shape[0])

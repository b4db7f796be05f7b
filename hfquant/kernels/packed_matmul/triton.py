"""Float activations times packed weights, in Triton, straight from the stored layout.

The product is formed transposed, ``acc [BN, BM] = weight [BN, K] @ x.T [K, BM]``: codes become the operand that stays
in registers and the few tokens become the narrow side of the tensor cores. ``SLICES`` warps of one program share the
rows and take ``BK`` inputs each (a batched product, one slice a batch): many short programs fill a GPU at M = 1 without
a second launch, a workspace or atomics, and sums are in a fixed order.

INT4 rows are read as int16: nibble j of unit e is input 4e + j, so x is split by j instead of reordering weights.
Scales multiply the float32 product of their group, or of the whole row; groups of 16 and 32 are too short for a tensor
core and multiply the weights, rounded to the dtype of x as a dequantized weight would be. Scales of groups are loaded
one step ahead: two bytes a row are too narrow for an asynchronous copy, and a step would wait for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.kernels.grid.triton import INTERPRETED, load_zero_point, nibble_codes, processors, signed_codes
from hfquant.numerics.packing import PackedWeight


SLICES = 4


@triton.jit
def _expert_tile(end_ptr, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr):
    """Expert of the row tile numbered ``tile``, its first row, and the end of the expert's rows."""
    e = tl.arange(0, PADDED)
    end = tl.load(end_ptr + e, mask=e < EXPERTS, other=0)
    start = tl.load(end_ptr + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles = tl.where(e < EXPERTS, (end - start + BM - 1) // BM, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    first = tl.sum(tl.where(e == expert, start, 0), 0) + (tile - before) * BM
    return tl.minimum(expert, EXPERTS - 1), first, tl.sum(tl.where(e == expert, end, 0), 0)


@triton.jit
def _nibble_products(w, x, scale, zero, PRE: tl.constexpr, ASM: tl.constexpr):
    """``codes @ x.T`` of int16 ``w [S, BN, E]`` and ``x [S, BM, 4 E]``; with ``PRE``, of weights instead of codes."""
    S: tl.constexpr = w.shape[0]
    E: tl.constexpr = w.shape[2]
    x02, x13 = tl.split(tl.reshape(x, (S, x.shape[1], E, 2, 2)))
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    w0, w1 = nibble_codes(w, 0, x.dtype, ASM), nibble_codes(w, 1, x.dtype, ASM)
    w2, w3 = nibble_codes(w, 2, x.dtype, ASM), nibble_codes(w, 3, x.dtype, ASM)
    if PRE:
        w0, w1 = _weights(w0, scale, zero), _weights(w1, scale, zero)
        w2, w3 = _weights(w2, scale, zero), _weights(w3, scale, zero)
    p = tl.dot(w0, tl.trans(x0, 0, 2, 1))
    p = tl.dot(w1, tl.trans(x1, 0, 2, 1), p)
    p = tl.dot(w2, tl.trans(x2, 0, 2, 1), p)
    return tl.dot(w3, tl.trans(x3, 0, 2, 1), p)


@triton.jit
def _products(w, x, zero, z_ptr, BITS: tl.constexpr, ASM: tl.constexpr):
    """``(codes - zero) @ x.T`` of a slice, in float32; INT8 codes are stored with their sign bit flipped."""
    if BITS == 4:
        products = _nibble_products(w, x, None, None, False, ASM)
    else:
        if x.dtype == tl.float16:
            unsigned = w.to(tl.uint8, bitcast=True).to(tl.uint16)
            codes = (unsigned | 0x6400).to(tl.float16, bitcast=True) - 1152.0  # 1024 + code + 128
        else:
            codes = signed_codes(w, ASM).to(x.dtype)
        products = tl.dot(codes, tl.trans(x, 0, 2, 1))
    if z_ptr is not None:
        products -= zero * tl.sum(x.to(tl.float32), 2)[:, None, :]
    return products


@triton.jit
def _weights(w, scale, zero):
    """``(w - zero) * scale`` for codes ``[S, BN, E]`` and one scale and zero point for each of ``[S, BN, groups]``."""
    S: tl.constexpr = w.shape[0]
    BN: tl.constexpr = w.shape[1]
    G: tl.constexpr = scale.shape[2]
    grouped = tl.reshape(w, (S, BN, G, w.shape[2] // G)) - zero.to(w.dtype)[:, :, :, None]
    if w.dtype == tl.bfloat16:
        values = grouped * scale.to(tl.bfloat16)[:, :, :, None]  # scales are bfloat16: one rounding, the last
    else:
        values = (grouped.to(tl.float32) * scale[:, :, :, None]).to(w.dtype)
    return tl.reshape(values, w.shape)


@triton.jit
def _load_groups(s_ptr, z_ptr, row, group, groups, ZERO_WORDS, BITS: tl.constexpr):
    """Scales and zero points ``[S, BN, NG]``, float32, of groups ``[S, 1, NG]`` in rows ``[BN]``; 0 beyond the last."""
    rows = row[None, :, None]
    known = (group < groups) & (rows >= 0)
    scale = tl.load(s_ptr + rows * groups + group, mask=known, other=0).to(tl.float32)
    zero = tl.zeros_like(scale)
    if z_ptr is not None:
        zero = load_zero_point(z_ptr + rows * ZERO_WORDS, group, known, BITS)
    return scale, zero


@triton.jit
def _store(acc, bias_ptr, row_scale_ptr, out_ptr, row, token, mask, n, N):
    """Add up the slices, scale and shift the rows, and store the transposed tile ``[BN, BM]``."""
    out = tl.sum(acc, 0)
    if row_scale_ptr is not None:
        out *= tl.load(row_scale_ptr + token)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    tl.store(out_ptr + token[None, :] * N + n[:, None], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def packed_matmul_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, row_scale_ptr, end_ptr, out_ptr, M, N, K, UNITS, ZERO_WORDS,
    BITS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """See the module; ``GROUP`` is 0 for one scale a row, ``EXPERTS`` is 0 for a single weight."""
    PRE: tl.constexpr = BITS == 4 and GROUP > 0 and GROUP < BK
    U: tl.constexpr = BK // 4 if BITS == 4 else BK
    first, last, base = tl.program_id(1) * BM, M, 0
    if EXPERTS > 0:
        expert, first, last = _expert_tile(end_ptr, tl.program_id(1), EXPERTS, PADDED, BM)
        base = expert.to(tl.int64) * N
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), first + tl.arange(0, BM)
    row, token = base + tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    part, u, k = tl.arange(0, S)[:, None, None], tl.arange(0, U)[None, None, :], tl.arange(0, BK)[None, None, :]
    w_at = w_ptr + row[None, :, None] * UNITS + (part * U + u)
    x_at = x_ptr + token[None, :, None] * K + (part * BK + k)
    acc, groups = tl.zeros((S, BN, BM), tl.float32), K // GROUP if GROUP > 0 else 1
    if not PRE:
        group = part * BK // GROUP if GROUP > 0 else part * 0
        scale, zero = _load_groups(s_ptr, z_ptr, row, group, groups, ZERO_WORDS, BITS)
    for i in tl.range(0, tl.cdiv(K, S * BK), num_stages=STAGES):
        piece = i * S + part
        if EVEN:
            w, x = tl.load(w_at + i * (S * U)), tl.load(x_at + i * (S * BK))
        else:
            w = tl.load(w_at + i * (S * U), mask=piece * U + u < UNITS, other=0)
            x = tl.load(x_at + i * (S * BK), mask=piece * BK + k < K, other=0)
        if PRE:
            group = piece * BK // GROUP + tl.arange(0, BK // GROUP)[None, None, :]
            scale, zero = _load_groups(s_ptr, z_ptr, row, group, groups, ZERO_WORDS, BITS)
            acc += _nibble_products(w, x, scale, zero, True, ASM)
        elif GROUP == 0:
            acc += _products(w, x, zero, z_ptr, BITS, ASM)
        else:
            group = (piece + S) * BK // GROUP
            next_scale, next_zero = _load_groups(s_ptr, z_ptr, row, group, groups, ZERO_WORDS, BITS)
            acc += scale * _products(w, x, zero, z_ptr, BITS, ASM)
            scale, zero = next_scale, next_zero
    acc = acc * scale if GROUP == 0 else acc
    _store(acc, bias_ptr, row_scale_ptr, out_ptr, row, token, (n < N)[:, None] & (m < last)[None, :], n, N)


def fits_groups(in_features: int, groups: int, bits: int) -> bool:
    """Whether the kernel can apply scales of groups of this size: whole slices, or powers of two within one."""
    size = in_features // groups
    return groups == 1 or (size % 128 == 0 or size in (16, 32, 64))


def packed_matmul(
    x: Tensor,
    packed: PackedWeight,
    *,
    bits: int,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    expert_ends: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x @ dequantize(packed).T) * row_scale + bias`` in one launch.

    Args:
        x: Rows ``[M, K]``, contiguous, float16 or bfloat16; sorted by expert where there are experts.
        packed: Weight ``[N, K]``, or ``[experts, N, K]``; ``fits_groups`` says which groups.
        bits: Bits per code.
        bias: ``[N]`` or ``[experts, N]``.
        row_scale: ``[M]``, float32.
        expert_ends: Number of rows up to and with each expert ``[experts]``, int32.
        dtype: Of the result; that of ``x`` if ``None``.

    Returns:
        ``[M, N]``; rows beyond the last expert's are 0.
    """
    weight, weight_scale, zero_point = packed
    (m, k), n, groups = x.shape, weight.shape[-2], weight_scale.shape[-1]
    new = x.new_empty if expert_ends is None else x.new_zeros
    out = new((m, n), dtype=dtype or x.dtype)
    if out.numel() == 0:
        return out
    experts = 0 if expert_ends is None else len(expert_ends)
    size, asymmetric = k // groups if groups > 1 else 0, zero_point is not None
    tile = choose_tile(n * max(experts, 1), m // max(experts, 1), k, size, bits, x.device, asymmetric=asymmetric)
    grid = (triton.cdiv(n, tile["BN"]), triton.cdiv(m, tile["BM"]) + experts)
    units = weight.contiguous().view(torch.int16 if bits == 4 else torch.int8)
    zero_words = 0 if zero_point is None else zero_point.shape[-1]
    with torch.cuda.device_of(x):
        packed_matmul_kernel[grid](
            x, units, weight_scale.contiguous().view(torch.bfloat16), zero_point, bias, row_scale, expert_ends, out,
            m, n, k, units.shape[-1], zero_words, BITS=bits, EXPERTS=experts,
            PADDED=triton.next_power_of_2(experts or 1), ASM=not INTERPRETED, num_warps=SLICES, **tile,
        )  # fmt: skip
    return out


def choose_tile(
    n: int, m: int, k: int, group: int, bits: int, device: torch.device, *, asymmetric: bool = False
) -> dict[str, int | bool]:
    """Tile for ``m`` rows and ``n`` outputs: as many rows of the weight as still give every processor work.

    Sizes were measured on an H200 (benchmarks/gpu_tiles.py); they neither spill nor exceed shared memory on any target
    (tests/kernels/test_triton_compile.py).
    """
    bm = 8 if m <= 8 else 16 if m <= 16 else 32
    # Zero points of short groups: wider steps spill with Triton 3.6 and exceed small cards with 3.8.
    bk = 64 if bm == 32 or group == 64 or (asymmetric and 0 < group <= 32) else 128
    if bits == 8 and 0 < group < bk:
        bk = group
    bn = 64
    while bn > 16 and -(-n // bn) * -(-m // bm) < 3 * processors(device) // 4:
        bn //= 2
    stages = 4 if bm < 32 and (bn <= 32 or bk <= 64) else 3
    even = k % (SLICES * bk) == 0
    return {"GROUP": group, "BK": bk, "S": SLICES, "BN": bn, "BM": bm, "STAGES": stages, "EVEN": even}

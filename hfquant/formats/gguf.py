"""GGUF blocks: what llama.cpp runs.

A row is cut into blocks of 32 weights, each with a float16 step ``d`` (https://github.com/ggml-org/ggml, docs/gguf.md):

    Q4_0  18 bytes  d, 16 bytes            weight = d * (u - 8)     symmetric INT4, any group that is a multiple of 32
    Q4_1  20 bytes  d, m, 16 bytes         weight = d * u + m       asymmetric INT4 where m = -(zero + 8) * d is exact
    Q8_0  34 bytes  d, 32 bytes            weight = d * q           symmetric INT8

Nibbles: byte j holds weight j (low) and weight j + 16 (high). ``d`` may be negative. One scale per group or channel is
repeated for each of its blocks, so nothing is rounded.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfquant.errors import SchemeError
from hfquant.formats.stored_weight import StoredWeight


BLOCK = 32

BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of one block."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""``general.file_type`` of a file whose linear layers mostly have this type."""


def block_type(weight: StoredWeight) -> str | None:
    """``Q4_0``, ``Q4_1`` or ``Q8_0``; ``None`` if no block holds such a weight."""
    scheme, columns = weight.scheme.weight, weight.float_weight.in_features
    if columns % BLOCK or (scheme.group_size or BLOCK) % BLOCK or weight.float_weight.transposed:
        return None
    if scheme.symmetric:
        return "Q4_0" if scheme.bits == 4 else "Q8_0"
    return "Q4_1" if scheme.bits == 4 else None


def check_block_type(weight: StoredWeight) -> str:
    """The block type of ``weight``.

    Raises:
        SchemeError: If it has none, with what would have.
    """
    kind = block_type(weight)
    if kind is None:
        raise SchemeError(
            f"{weight.name} ({weight.scheme}, {weight.float_weight.in_features} inputs): GGUF holds symmetric INT4 and "
            "INT8 and asymmetric INT4, in groups of a multiple of 32; quantize with group_size=32, 64 or 128, and "
            "symmetric=True for INT8"
        )
    return kind


def blocks(weight: StoredWeight) -> NDArray[np.uint8]:
    """Rows of blocks ``[N, bytes]``.

    Raises:
        SchemeError: If a scale or an offset has no exact float16 value, or no block type fits.
    """
    kind = check_block_type(weight)
    codes, rows = weight.codes, weight.float_weight.shape[0]
    repeats = weight.float_weight.in_features // BLOCK // weight.packed.weight_scale.shape[-1]
    step = weight.scale_in(torch.float16).repeat_interleave(repeats, 1)  # [N, K // 32]
    parts = [_bytes(step.unsqueeze(-1))]
    if kind == "Q4_1":
        parts.append(_bytes(_offset(weight).repeat_interleave(repeats, 1).unsqueeze(-1)))
    if kind == "Q8_0":
        parts.append(codes.reshape(rows, -1, BLOCK).view(torch.uint8))
    else:
        nibbles = (codes + 8).view(torch.uint8).reshape(rows, -1, 2, BLOCK // 2)
        parts.append(nibbles[:, :, 0] | (nibbles[:, :, 1] << 4))
    return torch.cat(parts, -1).flatten(1).numpy()


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _offset(weight: StoredWeight) -> Tensor:
    """``m`` of each group, float16."""
    assert weight.zero_point is not None
    exact = -(weight.zero_point.float() + 8) * weight.scale
    offset = exact.to(torch.float16)
    wrong = int((offset.float() != exact).sum())
    if wrong:
        raise SchemeError(
            f"{weight.name}: the offsets of {wrong} of {exact.numel()} groups have no exact float16 value in GGUF's "
            "Q4_1; quantize with symmetric=True, which Q4_0 holds exactly"
        )
    return offset


def interleave_heads(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding (pairs side by side)."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

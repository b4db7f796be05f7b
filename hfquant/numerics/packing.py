"""The one packed layout: unsigned codes, least significant first, in little-endian int32 words.

A code ``c`` of ``b`` bits is stored as ``c + 2**(b-1)``. A row of K codes takes ``ceil(K * b / 32)`` words; what is
left of the last word is zero. This is the layout of compressed-tensors' ``pack-quantized``:

    INT4, one word:  | c7 | c6 | c5 | c4 | c3 | c2 | c1 | c0 |      bit 31 ... bit 0
    INT8, one word:  |   c3    |   c2    |   c1    |   c0    |

A packed row is always shorter than the float row (K >= 2), so a program that takes it for a float weight fails.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedWeight(NamedTuple):
    """A quantized weight as it is stored.

    Attributes:
        weight: Packed codes ``[..., N, W]``, int32.
        weight_scale: Bit patterns of the bfloat16 scales ``[..., N, K // G]``, int16.
        weight_zero_point: Packed zero points ``[..., N, ceil(K // G * bits / 32)]``, int32, or ``None``.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None


def packed_length(length: int, bits: int) -> int:
    """Words that hold ``length`` codes of ``bits`` bits."""
    return -(-length * bits // 32)


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack codes ``[..., K]`` (int8, within range) into words ``[..., ceil(K * bits / 32)]`` (int32)."""
    length = codes.shape[-1]
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    padded = packed_length(length, bits) * 32 // bits
    if padded != length:
        unsigned = torch.nn.functional.pad(unsigned, (0, padded - length))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    # By way of one dimension: a contiguous tensor may have any stride along a dimension of size 1.
    return unsigned.reshape(-1).view(torch.int32).view(*codes.shape[:-1], packed_length(length, bits))


def unpack(words: Tensor, *, bits: int, length: int) -> Tensor:
    """Codes ``[..., length]`` (int8) of words ``[..., ceil(length * bits / 32)]`` (int32)."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(-2)
    codes = (unsigned ^ 128).view(torch.int8) if bits == 8 else unsigned.view(torch.int8) - 8
    return codes if codes.shape[-1] == length else codes[..., :length]


def has_clean_padding(words: Tensor, *, bits: int, length: int) -> bool:
    """Whether the bits behind the last code of each row are zero, as ``pack`` leaves them."""
    used = length * bits % 32
    if used == 0 or words.numel() == 0:
        return True
    last = words[..., -1].to(torch.int64) & 0xFFFFFFFF
    return bool((last >> used == 0).all())

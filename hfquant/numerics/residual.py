"""What rounding took from a weight, kept in four bits: where it really lies between two codes.

With ``steps = w / s + zero`` and ``code`` the stored code, the residual is ``k = round(16 * (steps - code))``, from -7
to 7: less than half a step, so that ``round(code + k / 16) == code`` always.
"""

import torch
from torch import Tensor

from hfquant.numerics.affine import scale_from_bits, split_groups
from hfquant.numerics.packing import PackedWeight, pack, packed_length, unpack


LARGEST = 7
"""Sixteenths of a step; 8 would be half a step, which can round to the next code."""

CHUNK_ROWS = 1024
"""Rows in float32 at a time."""


def rounding_residual(weight: Tensor, packed: PackedWeight, *, bits: int) -> Tensor:
    """Residual of ``weight`` at the codes it was given, by whatever algorithm.

    Args:
        weight: The float weight ``[..., N, K]``.
        packed: Its codes, scales and zero points.
        bits: Bits per code.

    Returns:
        Packed with 4 bits ``[..., N, ceil(K / 8)]``, int32.
    """
    length, groups = weight.shape[-1], packed.weight_scale.shape[-1]
    rows, (words, scales, zeros) = (
        weight.detach().flatten(0, -2),
        (None if t is None else t.flatten(0, -2) for t in packed),
    )
    assert words is not None
    assert scales is not None
    out = words.new_empty(rows.shape[0], packed_length(length, 4))
    for start in range(0, rows.shape[0], CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        steps = split_groups(rows[part].float(), length // groups) / scale_from_bits(scales[part]).unsqueeze(-1)
        if zeros is not None:
            steps += unpack(zeros[part], bits=bits, length=groups).unsqueeze(-1)
        out[part] = sixteenths(steps.flatten(-2) - unpack(words[part], bits=bits, length=length))
    return out.view(*weight.shape[:-1], -1)


def sixteenths(difference: Tensor) -> Tensor:
    """Packed residual of differences from the code ``[..., K]``, in steps."""
    return pack((difference * 16).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), bits=4)


def dither(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A packed residual drawn evenly from -7 to 7, for a weight ``[..., N, K]`` whose own was not kept.

    Without any, nothing would change before the adapter moves a weight by half a step.
    """
    return pack(torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator, dtype=torch.int8), bits=4)

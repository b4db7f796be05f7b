"""The grid: the one definition of scale, codes and values that everything else uses.

``codes = clamp(round(x / scale) + zero_point)`` and ``x = (codes - zero_point) * scale``.
Training, conversion, inference, merge and export call these functions on the model's final state;
scales are never derived again from rounded weights.

Scales are rounded to bfloat16 before any code is computed, so that a bfloat16 copy loses nothing.
They are stored as the bit pattern of that bfloat16 in int16 (``scale_to_bits``): integers survive every
cast (`.to(bf16)`, FSDP2, DeepSpeed) and do not pass for the dtype of the model.
"""

import torch
from torch import Tensor

from hfquant.errors import SchemeError


LARGEST_SCALE = float(torch.finfo(torch.bfloat16).max)
SMALLEST_SCALE = float(torch.finfo(torch.bfloat16).tiny)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def split_groups(x: Tensor, group_size: int | None) -> Tensor:
    """View ``x [..., K]`` as ``[..., K // G, G]``; ``group_size=None`` makes the row one group.

    Raises:
        SchemeError: If ``K`` is not a multiple of ``group_size``.
    """
    size = x.shape[-1] if group_size is None else group_size
    if size == 0 or x.shape[-1] % size:
        raise SchemeError(f"a row of {x.shape[-1]} values does not split into groups of {size}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def round_scale(scale: Tensor) -> Tensor:
    """Nearest usable bfloat16 value of ``scale``, in float32; 0 becomes 1, the sign is kept.

    A group of zeros has no scale of its own: 1 gives it codes of 0. The rest is kept within the normal
    range of bfloat16, so that dividing by it never overflows to infinity or divides by zero.
    """
    magnitude = scale.float().abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).float()
    rounded = torch.where(scale < 0, -magnitude, magnitude)
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def scale_to_bits(scale: Tensor) -> Tensor:
    """Bit pattern of a bfloat16-representable ``scale`` (any shape, float32) as int16."""
    return scale.to(torch.bfloat16).view(torch.int16)


def scale_from_bits(bits: Tensor) -> Tensor:
    """Float32 value of a scale stored by ``scale_to_bits``."""
    return bits.view(torch.bfloat16).float()


def choose_scale(x: Tensor, *, bits: int) -> Tensor:
    """Round-to-nearest's scale: the largest magnitude of each group falls on the edge of the grid.

    Args:
        x: Values in groups ``[..., G]``, float32.
        bits: Bits per code. With 4 the edge is 7.5 steps out (half a step beyond the last positive code);
            with 8 it is 127, where half a step in 127.5 is worth less than no clipping.

    Returns:
        Scale ``[...]`` in units of ``x``, float32, positive and bfloat16-representable.
    """
    return round_scale(x.abs().amax(-1) / absmax_divisor(bits))


def absmax_divisor(bits: int) -> float:
    """Steps from zero to the largest magnitude of a group: 7.5 for 4 bits, 127 for 8."""
    return 7.5 if bits == 4 else float((1 << (bits - 1)) - 1)


def choose_scale_and_zero_point(x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Asymmetric grid that spans each group's range, zero included.

    Args:
        x: Values in groups ``[..., G]``, float32.
        bits: Bits per code.

    Returns:
        Scale ``[...]`` (float32, positive, bfloat16-representable) and the code of 0.0 ``[...]`` (int8).

    References:
        Jacob et al. 2018, section 2. https://arxiv.org/abs/1712.05877
    """
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    smallest, largest = code_range(bits)
    scale = round_scale((high - low) / (largest - smallest))
    zero_point = (smallest - torch.round(low / scale)).clamp(smallest, largest)
    return scale, zero_point.to(torch.int8)


def choose_row_scale(x: Tensor) -> Tensor:
    """Dynamic INT8 scale of each token, ``absmax / 127``; 1 for a row of zeros.

    Args:
        x: Activations ``[M, K]``, any floating dtype.

    Returns:
        Scale ``[M, 1]``, float32; not finite where the row is not.
    """
    if x.shape[-1] == 0:
        return torch.ones(*x.shape[:-1], 1, device=x.device)
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def choose_row_scale_and_zero_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic INT8 grid of each token that spans its range, zero included, in 255 steps.

    Outliers of activations have a sign of their own in most tokens, so that half of a symmetric grid stays empty.

    Args:
        x: Activations ``[M, K]``, any floating dtype.

    Returns:
        Scale ``[M, 1]``, float32, not finite where the row or its range is not, and the code of 0.0 ``[M, 1]``, int8.

    References:
        Jacob et al. 2018, section 2. https://arxiv.org/abs/1712.05877
    """
    smallest, largest = code_range(8)
    if x.shape[-1] == 0:
        scale = torch.ones(*x.shape[:-1], 1, device=x.device)
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    low = x.amin(-1, keepdim=True).clamp_max(0).float()
    high = x.amax(-1, keepdim=True).clamp_min(0).float()
    scale = (high - low) / (largest - smallest)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (smallest - torch.round(low / scale)).nan_to_num_(nan=0.0).clamp_(smallest, largest)
    return scale, zero_point.to(torch.int8)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int) -> Tensor:
    """Nearest codes of ``x``: ``clamp(round(x / scale) + zero_point)``, ties to even.

    Args:
        x: Values ``[..., G]``; computed in float32.
        scale: Size of one step, broadcastable to ``x``; finite and not zero, of either sign.
        zero_point: Code that stands for 0.0, broadcastable, int8; ``None`` means 0.
        bits: Bits per code, 4 or 8.

    Returns:
        Codes like ``x``, int8, within ``[-2**(bits-1), 2**(bits-1) - 1]``.

    References:
        Jacob et al. 2018, eq. 1. https://arxiv.org/abs/1712.05877
    """
    steps = torch.round(x.float() / scale)
    if zero_point is not None:
        steps = steps + zero_point
    return steps.clamp_(*code_range(bits)).to(torch.int8)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of ``codes``: ``(codes - zero_point) * scale``, computed in float32, then cast to ``dtype``.

    Args:
        codes: Integers ``[..., G]``, int8.
        scale: Size of one step, broadcastable to ``codes``, float32.
        zero_point: Code that stands for 0.0, broadcastable, int8; ``None`` means 0.
        dtype: Of the result.

    Returns:
        Values like ``codes`` in ``dtype``.
    """
    steps = codes.float() if zero_point is None else codes.float() - zero_point.float()
    return (steps * scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of ``x``: what the deployed layer will compute with."""
    return dequantize(quantize(x, scale, zero_point, bits=bits), scale, zero_point, dtype=x.dtype)

"""The linear layer of quantization-aware training: computes on codes, and has gradients.

Tracing keeps it whole, forward and backward: no compiler can change how a weight is rounded.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfquant.kernels.dispatch import define_op, register_autograd, register_triton
from hfquant.kernels.fake_quant_linear.reference import (
    fake_quant_linear_backward_reference,
    fake_quant_linear_reference,
    learned_scale_reference,
)


class GridWeight(NamedTuple):
    """A float weight on its way to the grid.

    Attributes:
        weight: Float weight ``[..., N, K]``.
        log_scale: ``u`` of the learned scales ``[..., N, K // G]``, float32.
        scale: The scales ``initial * exp(u)`` ``[..., N, K // G]``, float32, without a gradient of their own.
        zero_point: ``[..., N, K // G]``, int8, or ``None``.
        codes: Codes ``[..., N, K]`` (int8) if they are known already; else they are computed, forward and backward.
        lora_a: Adapter inside the rounding ``[..., R, K]``, or ``None``.
        lora_b: ``[..., N, R]``, or ``None``.
    """

    weight: Tensor
    log_scale: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    codes: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def unbind(self) -> list["GridWeight"]:
        """The grids along the first dimension: one for each expert."""
        parts = [[None] * len(self.weight) if t is None else t.unbind(0) for t in self]
        return [GridWeight(*part) for part in zip(*parts, strict=True)]


_GRID = (
    "Tensor x, Tensor weight, Tensor log_scale, Tensor scale, Tensor? zero_point, Tensor? codes, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? input_log_scale, Tensor? input_scale, Tensor? bias, float lora_factor, bool dynamic, "
    "bool asymmetric, int bits, float blend"
)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_a, lora_b, input_scale = rest[2:5]
    needs_x, needs_weight = rest[10:]
    wide = torch.promote_types(weight.dtype, torch.float32)
    empty = x.new_empty(0)
    adapted = needs_weight and lora_a is not None
    return (
        x.new_empty(x.shape) if needs_x else empty,
        weight.new_empty(weight.shape if needs_weight else 0),
        scale.new_empty(scale.shape, dtype=wide) if needs_weight else empty,
        lora_a.new_empty(lora_a.shape, dtype=wide) if adapted else empty,
        lora_b.new_empty(lora_b.shape, dtype=wide) if adapted else empty,
        scale.new_empty(1, dtype=torch.promote_types(x.dtype, torch.float32))
        if needs_x and input_scale is not None
        else empty,
    )


define_op(
    "learned_scale(Tensor initial_bits, Tensor log_scale) -> Tensor",
    reference=learned_scale_reference,
    fake=lambda initial_bits, log_scale: initial_bits.new_empty(initial_bits.shape, dtype=torch.float32),
)
define_op(f"fake_quant_linear({_GRID}) -> Tensor", reference=fake_quant_linear_reference, fake=_fake)
define_op(
    "fake_quant_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, "
    "Tensor? codes, Tensor? lora_a, Tensor? lora_b, Tensor? input_scale, float lora_factor, bool dynamic, "
    "bool asymmetric, int bits, float blend, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=fake_quant_linear_backward_reference,
    fake=_fake_backward,
)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _refuses(x: Tensor, weight: Tensor, input_scale: Tensor | None, dynamic: bool, blend: float) -> str | None:
    if dynamic or input_scale is not None:
        return "activations are quantized"
    if blend != 1.0:
        return "values are blended with float ones"
    return None if {x.dtype, weight.dtype} <= set(_KERNEL_DTYPES) else f"{x.dtype} and {weight.dtype}"


register_triton("fake_quant_linear", lambda *a: _refuses(a[0], a[1], a[9], a[12], a[15]), quiet=True)
register_triton("fake_quant_linear_backward", lambda *a: _refuses(a[1], a[2], a[8], a[10], a[13]), quiet=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, zero_point, codes, lora_a, lora_b, _, input_scale, bias, *rest = inputs
    ctx.save_for_backward(x, weight, scale, zero_point, codes, lora_a, lora_b, input_scale)
    ctx.arguments, ctx.bias_dtype = rest, None if bias is None else bias.dtype
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:10]]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad
    needs_x, needs_weight = wanted[0] or wanted[8], wanted[1] or wanted[2] or wanted[6]
    grads: list[Tensor | None] = [None] * 16
    if needs_x or needs_weight:
        found = torch.ops.hfquant.fake_quant_linear_backward(
            grad, *ctx.saved_tensors, *ctx.arguments, needs_x, needs_weight
        )
        for place, value in zip((0, 1, 2, 6, 7, 8), found, strict=True):
            grads[place] = value.to(ctx.dtypes[place]) if wanted[place] else None
    if wanted[10]:
        grads[10] = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return tuple(grads)


register_autograd("fake_quant_linear", _backward, _setup_context)


def learned_scale_from_bits(initial_bits: Tensor, log_scale: Tensor) -> Tensor:
    """``learned_scale`` of scales kept as bit patterns, out of reach of a compiler, whose ``exp`` could differ.

    Args:
        initial_bits: Bit patterns of float32 scales ``[...]``, int32.
        log_scale: ``u`` ``[...]``, float32.

    Returns:
        Scales ``[...]``, float32, without a gradient: that of ``u`` comes from the op that uses them.
    """
    with torch.no_grad():
        out: Tensor = torch.ops.hfquant.learned_scale(initial_bits, log_scale)
    return out


def fake_quant_linear(
    x: Tensor,
    grid: GridWeight,
    *,
    bits: int,
    bias: Tensor | None = None,
    dynamic: bool = False,
    asymmetric: bool = False,
    input_log_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    lora_factor: float = 1.0,
    blend: float = 1.0,
) -> Tensor:
    """What ``int4_linear`` or ``int8_linear`` will compute on the codes of ``grid``, bit for bit, with gradients.

    Saves its inputs for the backward pass, and nothing else: values and masks are computed again there.

    Args:
        x: Activations ``[..., K]``.
        grid: The weight ``[N, K]`` and its scales; weight, ``log_scale`` and adapter get gradients.
        bits: Bits per code of the weight.
        bias: ``[N]``, cast to the dtype of ``x``, or ``None``.
        dynamic: Quantize activations to INT8 with one scale per row.
        asymmetric: With ``dynamic``: rows have a zero point too.
        input_log_scale: ``u`` of the static activation scale ``[1]``, for its gradient.
        input_scale: Static activation scale ``[1]``, float32; makes activations static INT8.
        lora_factor: The weight is ``weight + lora_factor * lora_b @ lora_a``.
        blend: Share of quantization: ``weight + blend * (values - weight)``, and the same for activations.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    scales = (input_log_scale, input_scale)
    out: Tensor = torch.ops.hfquant.fake_quant_linear(
        x, *grid, *scales, bias, lora_factor, dynamic, asymmetric, bits, blend
    )
    return out

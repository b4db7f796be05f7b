"""What ``int4_linear`` and ``int8_linear`` share: the schema, the shapes and the gradient.

    y = x @ dequantize(weight).T + bias                        activations in float
    y = (codes_x @ codes_w.T) * scale_x * scale_w + bias       ``dynamic`` or with an ``input_scale``

Arguments:
    x: Activations ``[..., K]``, float32, float16 or bfloat16.
    weight: Packed codes ``[N, W]``, int32.
    weight_scale: Bit patterns of the bfloat16 scales ``[N, K // G]``, int16.
    weight_zero_point: Packed zero points ``[N, ceil(K // G * bits / 32)]``, int32, or ``None``.
    input_scale: Bit pattern of the static activation scale ``[1]``, int16; makes activations static INT8.
    bias: ``[N]``, cast to the dtype of ``x``, or ``None``.
    dynamic: Quantize activations to INT8 with one scale per row.

Returns ``[..., N]`` in the dtype of ``x``, under autocast too. The gradient of ``x`` is ``grad @ dequantize(weight)``,
straight through the rounding of activations (Bengio et al. 2013, https://arxiv.org/abs/1308.3432); packed weights
have none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.dispatch import define_op, register_autograd, register_triton, run
from hfquant.numerics.packing import packed_length


_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? input_scale, Tensor? bias, "
    "bool dynamic) -> Tensor"
)


def define_linear(name: str, reference: Callable[..., Tensor], *, bits: int) -> None:
    """Define ``hfquant::<name>`` with the arguments above and its gradient."""

    def checked(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        zero_point: Tensor | None,
        input_scale: Tensor | None,
        bias: Tensor | None,
        dynamic: bool,
    ) -> Tensor:
        _check_activations(x, weight, name, bits)
        bias = None if bias is None else bias.to(x.dtype)
        # Autocast would round the exact integer products to bfloat16 and return another dtype than promised.
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = run(name, x, weight, weight_scale, zero_point, input_scale, bias, dynamic)
            return out

    def fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, weight_scale, zero_point, _, bias, _ = inputs
        ctx.save_for_backward(weight, weight_scale, zero_point)
        ctx.in_features, ctx.has_bias = x.shape[-1], bias is not None

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            values = dequantize_weight(*ctx.saved_tensors, bits=bits, in_features=ctx.in_features, dtype=grad.dtype)
            grad_x = grad @ values
        if ctx.has_bias and ctx.needs_input_grad[5]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return grad_x, None, None, None, None, grad_bias, None

    define_op(name + _ARGUMENTS, reference=reference, fake=fake, entry=checked)
    register_triton(name, _refuses)
    register_autograd(name, backward, setup_context)


def _refuses(x: Tensor, *_: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}"
    return None if x.numel() else "there are no activations"


def _check_activations(x: Tensor, weight: Tensor, name: str, bits: int) -> None:
    if not x.is_floating_point():
        raise KernelError(
            f"{name}: activations are {x.dtype}, expected a floating dtype. The model probably casts its input to "
            "`weight.dtype` of this layer, which is an integer here; add the layer to skip_modules"
        )
    if packed_length(x.shape[-1], bits) != weight.shape[-1]:
        raise KernelError(
            f"{name}: rows of x hold {x.shape[-1]} values, but rows of the packed weight hold up to "
            f"{weight.shape[-1] * 32 // bits}; give x [..., K] with the K of the weight"
        )

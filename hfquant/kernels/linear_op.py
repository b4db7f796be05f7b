"""What ``int4_linear`` and ``int8_linear`` share: the schema, the shapes and the gradient.

    y = x @ dequantize(weight).T + bias                        activations in float
    y = ((codes_x - zero_x) @ codes_w.T) * scale_x * scale_w + bias       ``dynamic`` or with an ``input_scale``

Arguments:
    x: Activations ``[..., K]``, float32, float16 or bfloat16.
    weight: Packed codes ``[N, W]``, int32.
    weight_scale: Bit patterns of the bfloat16 scales ``[N, K // G]``, int16.
    weight_zero_point: Packed zero points ``[N, ceil(K // G * bits / 32)]``, int32, or ``None``.
    input_scale: Bit pattern of the static activation scale ``[1]``, int16; makes activations static INT8.
    bias: ``[N]``, cast to the dtype of ``x``, or ``None``.
    dynamic: Quantize activations to INT8 with one scale per row.
    asymmetric: With ``dynamic``: rows have a zero point too.
    precision: Of float32 activations that are not quantized, ``native.float32_precision()``; other implementations
        than the native one leave it to torch.

Returns ``[..., N]`` in the dtype of ``x``, under autocast too. The gradient of ``x`` is ``grad @ dequantize(weight)``,
straight through the rounding of activations (Bengio et al. 2013, https://arxiv.org/abs/1308.3432); packed weights
have none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import KernelError
from hfquant.kernels import native
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.dispatch import define_op, register_autograd, register_native, register_triton, run
from hfquant.numerics.packing import packed_length


_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? input_scale, Tensor? bias, "
    "bool dynamic, bool asymmetric, int precision=0) -> Tensor"
)


def define_linear(name: str, reference: Callable[..., Tensor], *, bits: int) -> Callable[..., Tensor]:
    """Define ``hfquant::<name>`` with the arguments above and its gradient; returns the function that calls it."""

    def checked(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        zero_point: Tensor | None,
        input_scale: Tensor | None,
        bias: Tensor | None,
        dynamic: bool,
        asymmetric: bool,
        precision: int = 0,  # torch leaves out what is the default
    ) -> Tensor:
        _check_activations(x, weight, name, bits)
        if x.device.type == "cpu":
            native.warn_if_missing()
        bias = None if bias is None else bias.to(x.dtype)
        # Autocast would round the exact integer products to bfloat16 and return another dtype than promised.
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = run(
                name, x, weight, weight_scale, zero_point, input_scale, bias, dynamic, asymmetric, precision
            )
            return out

    def fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    define_op(name + _ARGUMENTS, reference=reference, fake=fake, entry=checked)
    register_native(name, lambda x, w, scale, zero, _, bias, *kind: _is_native(x, w, scale, zero, bias, bits))
    register_triton(name, _refuses)
    _register_gradient(name, bits)
    return _with_short_cut(name, bits)


def _register_gradient(name: str, bits: int) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, weight_scale, zero_point, _, bias, *_ = inputs
        ctx.save_for_backward(weight, weight_scale, zero_point)
        ctx.in_features, ctx.has_bias = x.shape[-1], bias is not None

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            values = dequantize_weight(*ctx.saved_tensors, bits=bits, in_features=ctx.in_features, dtype=grad.dtype)
            grad_x = grad @ values
        if ctx.has_bias and ctx.needs_input_grad[5]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return grad_x, None, None, None, None, grad_bias, None, None, None

    register_autograd(name, backward, setup_context)


def _with_short_cut(name: str, bits: int) -> Callable[..., Tensor]:
    """The function that callers use: the native op itself where it applies and no gradient is wanted.

    Gradients that are written in Python make torch run every call through Python, which costs more than a small layer.
    """
    op: Any = getattr(torch.ops.hfquant, name).default
    native_op: Any = getattr(torch.ops.hfquant, f"{name}_cpu").default

    def call(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None = None,
        *,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        dynamic: bool = False,
        asymmetric: bool = False,
    ) -> Tensor:
        trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        # An exported program has to run on machines without the native library, and with gradients.
        if trains or torch.compiler.is_exporting():
            chosen = op
        else:
            fits = native.is_active() and _is_native(x, weight, weight_scale, weight_zero_point, bias, bits)
            chosen = native_op if fits else op
        tensors, precision = (x, weight, weight_scale, weight_zero_point, input_scale, bias), native.float32_precision()
        out: Tensor = chosen(*tensors, dynamic, asymmetric, precision)
        return out

    return call


class ShortCut:
    """The native op for the packed tensors of a module, which fit each other; it raises ``RuntimeError`` at others.

    Attributes:
        op: The native op; the arguments of this page, all of them, by position.
    """

    def __init__(self, name: str) -> None:
        """Takes the op ``name``, which is defined."""
        self.op: Any = getattr(torch.ops.hfquant, f"{name}_cpu").default

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the op may compute ``x [..., K]``: not where gradients, autocast or a compiler have to see more."""
        return (
            x.is_cpu
            and native.is_active()
            and x.dtype in native.FLOATS
            and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )


def _is_native(
    x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> bool:
    fits = weight_fits_native(weight, weight_scale, zero_point, bias, x.size(-1), bits)
    return fits and x.is_cpu and x.dtype in native.FLOATS


def weight_fits_native(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, inputs: int, bits: int
) -> bool:
    """Whether the native kernels take these tensors; groups must fill whole lanes of a vector, 4 bytes of codes."""
    groups = weight_scale.size(-1)
    return (
        0 < inputs <= native.MAX_IN_FEATURES
        and packed_length(inputs, bits) == weight.size(-1)
        and (groups == 1 or inputs % (groups * 32 // bits) == 0)
        and weight.is_contiguous()
        and weight_scale.is_contiguous()
        and (zero_point is None or zero_point.is_contiguous())
        and (bias is None or bias.dtype in native.FLOATS)
    )


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

"""The linear layer of quantized fine-tuning: computes on the codes it is deployed with, and has gradients.

Its weight is packed all the time; a dense one exists while one layer is computed, forward and backward, and no longer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfquant.kernels.dispatch import define_op, register_autograd
from hfquant.kernels.grid_linear.reference import grid_linear_backward_reference, grid_linear_reference


class GridAdapter(NamedTuple):
    """A packed weight and what trains on it.

    Attributes:
        weight: Packed codes that training started from ``[..., N, W]``, int32.
        weight_scale: Bit patterns of the bfloat16 scales that training started from ``[..., N, K // G]``, int16.
        weight_zero_point: Packed zero points ``[..., N, ceil(K // G * bits / 32)]``, int32, or ``None``.
        log_scale: ``u`` of the learned scales ``initial * exp(u)`` ``[..., N, K // G]``, float32.
        residual: What rounding took from each weight, in sixteenths of a step, packed with 4 bits, or ``None``.
        lora_a: Adapter inside the rounding ``[..., R, K]``, or ``None``: the codes stay.
        lora_b: ``[..., N, R]``, or ``None``.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    log_scale: Tensor
    residual: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def unbind(self) -> list["GridAdapter"]:
        """The adapters along the first dimension: one for each expert."""
        parts = [[None] * len(self.weight) if t is None else t.unbind(0) for t in self]
        return [GridAdapter(*part) for part in zip(*parts, strict=True)]


_ADAPTER = (
    "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor log_scale, Tensor? residual, "
    "Tensor? lora_a, Tensor? lora_b, Tensor? input_scale, Tensor? input_log_scale"
)


def _fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    log_scale, lora_a, lora_b, input_log_scale = rest[3], *rest[5:7], rest[8]
    needs_x, needs_weight = rest[-2:]

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return x.new_empty(0)
        return tensor.new_empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))

    grad_x = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    return grad_x, *(like(t, needs_weight) for t in (log_scale, lora_a, lora_b)), like(input_log_scale, needs_x)


define_op(
    f"grid_linear(Tensor x, {_ADAPTER}, Tensor? bias, float lora_factor, bool dynamic, bool asymmetric, int bits, "
    "bool rounded) -> Tensor",
    reference=grid_linear_reference,
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
define_op(
    f"grid_linear_backward(Tensor grad, Tensor x, {_ADAPTER}, float lora_factor, bool dynamic, bool asymmetric, "
    "int bits, bool rounded, bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=grid_linear_backward_reference,
    fake=_fake_backward,
)

PLACES = (0, 4, 6, 7, 9)
"""Of x, log_scale, lora_a, lora_b and input_log_scale among the arguments."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, factor, dynamic, asymmetric, bits, rounded = inputs
    ctx.save_for_backward(*tensors)
    ctx.arguments = factor, dynamic, asymmetric, bits, rounded
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted, tensors = ctx.needs_input_grad, ctx.saved_tensors
    needs_x, needs_weight = wanted[0] or wanted[9], wanted[4] or wanted[6]
    grads: list[Tensor | None] = [None] * 16
    if needs_x or needs_weight:
        found = torch.ops.hfquant.grid_linear_backward(grad, *tensors, *ctx.arguments, needs_x, needs_weight)
        for place, value in zip(PLACES, found, strict=True):
            grads[place] = value.to(tensors[place].dtype) if wanted[place] else None
    if wanted[10]:
        grads[10] = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return tuple(grads)


register_autograd("grid_linear", _backward, _setup_context)


def grid_linear(
    x: Tensor,
    adapter: GridAdapter,
    *,
    bits: int,
    bias: Tensor | None = None,
    dynamic: bool = False,
    asymmetric: bool = False,
    input_scale: Tensor | None = None,
    input_log_scale: Tensor | None = None,
    lora_factor: float = 1.0,
    rounded: bool = True,
) -> Tensor:
    """What ``int4_linear`` or ``int8_linear`` computes on the merged weight, bit for bit, with gradients.

    The codes are ``clamp(round(codes + residual / 16 + lora_factor * lora_b @ lora_a / initial))``, the scales
    ``initial * exp(u)`` rounded to bfloat16: ``B @ A`` is a change of the weight in its own units, as in LoRA. (In
    steps it would change sign with every group whose scale is negative, and be no low rank.) With the gradient ``G``
    of the dense weight and ``m = 1`` where a code is not clipped, the gradient of ``B @ A`` is
    ``lora_factor * m * s / initial * G``, straight through the rounding, and that of ``u`` is exact:
    ``s * sum(G * (codes - zero_point))`` over the group.

    With ``rounded=False`` an adapter's codes are neither rounded nor clipped: the weight is
    ``s * (codes + residual / 16 + lora_factor * lora_b @ lora_a / initial - zero_point)``, as delayed quantization
    trains it at first. ``m`` is 1, and the gradient of ``u`` is 0: scales wait for the rounding, which chooses others.

    Args:
        x: Activations ``[..., K]``.
        adapter: The packed weight ``[N, K]`` and what trains on it; ``log_scale`` and ``lora`` get gradients.
        bits: Bits per code of the weight.
        bias: ``[N]``, cast to the dtype of ``x``, or ``None``.
        dynamic: Quantize activations to INT8 with one scale per row.
        asymmetric: With ``dynamic``: rows have a zero point too.
        input_scale: Bit pattern of the static activation scale ``[1]``, int16; makes activations static INT8.
        input_log_scale: ``u`` of the static activation scale ``[1]``.
        lora_factor: ``alpha / rank``.
        rounded: Compute with codes; without an adapter it makes no difference.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    References:
        Bondarenko et al. 2024 (LR-QAT), eq. 5 to 7, https://arxiv.org/abs/2406.06385 (adapters inside the rounding);
        Kim et al. 2023 (PEQA), https://arxiv.org/abs/2305.14152 (scales); Jacob et al. 2018, section 3.1,
        https://arxiv.org/abs/1712.05877 (delayed quantization).
    """
    scales = (input_scale, input_log_scale)
    activations = (lora_factor, dynamic, asymmetric)
    out: Tensor = torch.ops.hfquant.grid_linear(x, *adapter, *scales, bias, *activations, bits, rounded)
    return out

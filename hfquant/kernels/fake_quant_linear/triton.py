"""On a GPU: the weight comes from one launch, and so do its gradients; products are cuBLAS's."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from hfquant.kernels.fake_quant_linear.reference import adapted_weight
from hfquant.kernels.fake_quantize.triton import fake_quantize_backward_triton, fake_quantize_triton


def fake_quant_linear_triton(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codes: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    input_log_scale: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    lora_factor: float,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
    blend: float,
) -> Tensor:
    """See ``hfquant.kernels.fake_quant_linear.fake_quant_linear``; codes that are known are found again, sooner."""
    with torch.autocast(x.device.type, enabled=False):
        adapted = adapted_weight(weight, lora_a, lora_b, lora_factor)
        values = fake_quantize_triton(adapted, scale, zero_point, bits, x.dtype)
        return linear(x, values, None if bias is None else bias.to(x.dtype))


def fake_quant_linear_backward_triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codes: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    input_scale: Tensor | None,
    lora_factor: float,
    dynamic: bool,
    asymmetric: bool,
    bits: int,
    blend: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, log_scale, lora_a, lora_b and input_log_scale; those nobody needs are empty."""
    grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    empty = grad_x = grad_weight = grad_scale = grad_a = grad_b = x.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        adapted = adapted_weight(weight, lora_a, lora_b, lora_factor)
        if needs_x:
            values = fake_quantize_triton(adapted, scale, zero_point, bits, grad.dtype)
            grad_x = (grad_rows @ values).view(x.shape)
        if needs_weight:
            product = grad_rows.t() @ rows
            grad_weight, grad_scale = fake_quantize_backward_triton(
                product, adapted, scale, zero_point, bits, torch.float32
            )
            grad_scale = grad_scale.mul_(scale)
            if lora_a is not None and lora_b is not None:
                grad_a = (lora_b.t().float() @ grad_weight).mul_(lora_factor)
                grad_b = (grad_weight @ lora_a.t().float()).mul_(lora_factor)
            grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight, grad_scale, grad_a, grad_b, empty

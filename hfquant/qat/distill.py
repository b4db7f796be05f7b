"""Distillation: the quantized student learns the distribution of the float model it came from."""

import copy

import torch
from torch import Tensor, nn


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """``T**2 * KL(teacher || student)`` at temperature ``T``, summed over positions.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``, without gradient.
        mask: Positions that count ``[...]``, bool; ``None`` counts all.
        temperature: ``T``, by which both logits are divided.

    Returns:
        The sum in nats and the number of positions, both 0-dimensional.

    References:
        Hinton et al. 2015, section 2. https://arxiv.org/abs/1503.02531
    """
    if mask is not None:
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    student = torch.log_softmax(student_logits.flatten(0, -2).float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.flatten(0, -2).float() / temperature, dim=-1)
    total = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return total * temperature**2, torch.tensor(student.shape[0], device=student.device)


def teacher_copy(model: nn.Module) -> nn.Module:
    """A frozen bfloat16 copy of the float ``model``, for training that moves the weights themselves."""
    # deepcopy takes the parameters in its memo instead of copying the float32 ones first.
    memo = {id(p): nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo).to(torch.bfloat16).eval()

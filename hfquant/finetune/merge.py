"""From a model in fine-tuning to the packed model it computes as: the codes and scales of its last state."""

import torch
from torch import Tensor, nn

from hfquant.errors import ConfigError, SchemeError
from hfquant.finetune.adapted import adapted_modules
from hfquant.nn.adapted_module import NOT_ROUNDED


def merge_modules_(model: nn.Module) -> None:
    """Turn every module in training into the packed module it computes as, in place; no code changes.

    Raises:
        ConfigError: If weights are not rounded yet.
        SchemeError: If a trained parameter is NaN or infinite.
    """
    check_rounded(model)
    check_trained(model)
    for _, module in list(adapted_modules(model)):
        module.merge_()


def merged_state_dict(model: nn.Module, *, checkpoint: bool = False) -> dict[str, Tensor]:
    """The state dict that ``model`` has when it is merged; training goes on.

    Args:
        model: In fine-tuning, or any other.
        checkpoint: Weights may be such that are not rounded yet.

    Raises:
        ConfigError: If weights are not rounded yet.
        SchemeError: If a trained parameter is NaN or infinite.
    """
    if not checkpoint:
        check_rounded(model)
    check_trained(model)
    state_dict: dict[str, Tensor] = model.state_dict()
    for name, module in adapted_modules(model):
        prefix = f"{name}." if name else ""
        for key in module.companions() | set(module.float_weights):
            state_dict.pop(prefix + key, None)
        state_dict |= {prefix + key: tensor for key, tensor in module.merged().items()}
    return state_dict


def check_rounded(model: nn.Module) -> None:
    """Refuse a model that computes with weights which are not rounded yet.

    Raises:
        ConfigError: If a module does.
    """
    for name, module in adapted_modules(model):
        if not module.rounded:
            raise ConfigError(f"{name}: {NOT_ROUNDED}")


def check_trained(model: nn.Module) -> None:
    """Refuse a model whose training diverged; its codes would be garbage.

    Raises:
        SchemeError: Naming the first parameter of an adapted module that is NaN or infinite.
    """
    for name, module in adapted_modules(model):
        for key, parameter in module.trained().items():
            if not bool(torch.isfinite(parameter).all()):
                raise SchemeError(
                    f"{name}.{key} is NaN or infinite after training; lower the learning rate, or start from an "
                    "earlier checkpoint"
                )

"""Calling a model with one batch of calibration data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.errors import CalibrationError


def run_batch(model: nn.Module, batch: Any) -> Any:
    """What ``model`` returns for one batch, moved to the model's device.

    Raises:
        CalibrationError: If ``batch`` is neither a mapping, a tuple or list, nor a tensor.
    """
    device = next(model.parameters()).device
    call: Callable[..., Any] = model
    if isinstance(batch, Mapping):
        return call(**{key: _to(value, device) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return call(*(_to(value, device) for value in batch))
    if isinstance(batch, Tensor):
        return call(_to(batch, device))
    raise CalibrationError(
        f"a calibration batch is a {type(batch).__name__}; expected a mapping of the model's arguments (what a "
        "tokenizer returns with return_tensors='pt'), a tuple of them, or a tensor"
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

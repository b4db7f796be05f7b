"""Static activation scales from calibration data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.swap import packed_modules
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.observers import AbsMaxObserver


@torch.no_grad()
def calibrate_input_scales_(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> None:
    """Run ``batches`` through ``model`` and store the activation scale of every static layer.

    Args:
        model: Model whose static layers have their weights packed already; activations stay in float meanwhile.
        batches: What the model takes: mappings (keyword arguments), tuples (positional arguments) or tensors.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If there is no batch, a batch is of another type, activations are not finite, or a layer was
            never reached.
    """
    static = {
        name: module
        for name, module in packed_modules(model)
        if module.scheme.activation is not None and not module.scheme.activation.dynamic
    }
    with _observing(static) as observers, _evaluating(model):
        count = 0
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=not progress):
            run_batch(model, batch)
            count += 1
    if count == 0:
        raise CalibrationError("calibration_data is empty; give at least one batch")
    unreached = [f"{name} ({key})" for (name, key), observer in observers.items() if observer.rows == 0]
    if unreached:
        raise CalibrationError(
            f"no calibration batch reached {', '.join(unreached)}; add data that does, or put them in skip_modules"
        )
    for (name, key), observer in observers.items():
        device = static[name].packed(key).weight.device
        static[name].set_input_scale(scale_to_bits(observer.scale()).to(device), key)


def run_batch(model: nn.Module, batch: Any) -> None:
    """Call ``model`` with one batch, moved to the model's device.

    Raises:
        CalibrationError: If ``batch`` is neither a mapping, a tuple or list, nor a tensor.
    """
    device = next(model.parameters()).device
    call: Callable[..., Any] = model
    if isinstance(batch, Mapping):
        call(**{key: _to(value, device) for key, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        call(*(_to(value, device) for value in batch))
    elif isinstance(batch, Tensor):
        call(_to(batch, device))
    else:
        raise CalibrationError(
            f"a calibration batch is a {type(batch).__name__}; expected a mapping of the model's arguments (what a "
            "tokenizer returns with return_tensors='pt'), a tuple of them, or a tensor"
        )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _observing(modules: Mapping[str, PackedModule]) -> Iterator[dict[tuple[str, str], AbsMaxObserver]]:
    observers = {(name, key): AbsMaxObserver() for name, module in modules.items() for key in module.float_weights}

    def observe(name: str, key: str, x: Tensor) -> None:
        try:
            observers[name, key].observe(x)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}; check the model and the calibration data") from None

    for name, module in modules.items():
        module.input_observer = partial(observe, name)
    try:
        yield observers
    finally:
        for module in modules.values():
            module.input_observer = None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

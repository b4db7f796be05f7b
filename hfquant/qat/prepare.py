"""A float model to one that trains for its grid, and what the training loop switches in it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError, SchemeError
from hfquant.nn.fake_quant_embedding import FakeQuantEmbedding
from hfquant.nn.fake_quant_experts import FakeQuantExperts
from hfquant.nn.fake_quant_linear import FakeQuantLinear
from hfquant.nn.fake_quant_module import Adapter, FakeQuantModule
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_experts import QuantExperts
from hfquant.nn.quant_linear import QuantLinear
from hfquant.nn.select import Selection, packed_class
from hfquant.numerics.affine import round_scale
from hfquant.numerics.observers import AbsMaxObserver
from hfquant.numerics.packing import PackedWeight
from hfquant.schemes import WeightScheme


InitialScales = Callable[[Tensor, WeightScheme, str], PackedWeight]
"""From weight ``[..., N, K]``, scheme and name to a packed weight, whose scales training starts from."""

TRAINED_AS: dict[type[PackedModule], type[FakeQuantModule]] = {
    QuantLinear: FakeQuantLinear,
    QuantEmbedding: FakeQuantEmbedding,
    QuantExperts: FakeQuantExperts,
}
"""The packed class -> the class that trains for it."""


def fake_quant_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantModule]]:
    """All modules of ``model`` that train for a grid, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantModule):
            yield name, module


def prepare_modules_(
    model: nn.Module,
    selection: Selection,
    *,
    initial_scales: InitialScales,
    adapter: Adapter | None = None,
    without_adapter: Iterable[str] = (),
    progress: bool = True,
) -> None:
    """Swap the selected modules for ones that train for their scheme, in place, from the scales PTQ would choose.

    Args:
        model: Float model in memory.
        selection: What will be quantized, and how.
        initial_scales: What chooses the scales to start from.
        adapter: Give linear weights an adapter inside the rounding.
        without_adapter: Modules that get none: embeddings and heads.
        progress: Show a progress bar.

    Raises:
        SchemeError: If a weight holds NaN or infinity.
    """
    owners = {name: scheme for name, scheme in selection.schemes.items() if name not in selection.ties}
    for name, scheme in tqdm(owners.items(), desc="Preparing", unit="layer", disable=not progress):
        module = model.get_submodule(name)
        target = packed_class(module)
        assert target is not None
        weights = target.weights_of(module)
        initial = {
            key: initial_scales(weight.to_rows(module.get_parameter(key)), scheme.weight, f"{name}.{key}")
            for key, weight in weights.items()
        }
        own = None if name in without_adapter else adapter
        TRAINED_AS[target].swap_(module, scheme, weights, initial, own)
    for name, owner in selection.ties.items():
        module, source = model.get_submodule(name), model.get_submodule(owner)
        target = packed_class(module)
        assert target is not None
        assert isinstance(source, FakeQuantModule)
        TRAINED_AS[target].swap_(module, selection.schemes[name], target.weights_of(module), {})
        module.share_(source)  # type: ignore[operator]


@torch.no_grad()
def observe_input_scales_(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], None], *, progress: bool = True
) -> None:
    """Run ``batches`` through ``model`` and start every static activation scale from the largest magnitude seen.

    Nothing is left to observe while training, where a checkpointed layer runs twice. In a distributed run each process
    may give batches of its own: the magnitudes of all are used.

    Args:
        model: Prepared model; weights are quantized meanwhile, activations are not.
        batches: What the model takes, as for ``quantize_model_ptq``.
        run: Calls the model with one of them.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If there is no batch, activations are not finite, or a layer was never reached.
    """
    static = {name: m for name, m in fake_quant_modules(model) if m.scheme.quantization_type == "static"}
    observers = {(name, key): AbsMaxObserver() for name, m in static.items() for key in m.float_weights}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for name, module in static.items():
            module.input_observer = partial(_observe, name, observers)
        count = 0
        for batch in tqdm(batches, desc="Observing", unit="batch", disable=not progress):
            run(model, batch)
            count += 1
    finally:
        for module in static.values():
            module.input_observer = None
        for trained in training:
            trained.training = True
    if count == 0:
        raise CalibrationError("calibration_data is empty; give at least one batch")
    absmax = torch.tensor([observer.absmax if observer.rows else -1.0 for observer in observers.values()])
    absmax = _maximum_over_processes(absmax, next(model.parameters()).device)
    unreached = [f"{name} ({key})" for (name, key), m in zip(observers, absmax.tolist(), strict=True) if m < 0]
    if unreached:
        raise CalibrationError(f"no batch reached {', '.join(unreached)}; add data that does, or skip_modules")
    for (name, key), largest in zip(observers, absmax, strict=True):
        static[name].set_input_scale(round_scale(largest.view(1) / 127), key)


def _observe(name: str, observers: dict[tuple[str, str], AbsMaxObserver], key: str, x: Tensor) -> None:
    try:
        observers[name, key].observe(x)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}; check the model and the calibration data") from None


def _maximum_over_processes(values: Tensor, device: torch.device) -> Tensor:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return values
    shared = values.to(device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return shared.cpu()


def set_blend(model: nn.Module, blend: float) -> None:
    """Let every module compute with this share of quantization."""
    for _, module in fake_quant_modules(model):
        module.blend = blend


def keep_codes(model: nn.Module, keep: bool) -> None:
    """Keep codes while parameters do not change, a byte a weight, or compute them in every pass; forget those kept."""
    for _, module in fake_quant_modules(model):
        module.keeps_codes = keep
        module.forget_codes()


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Within: ``model`` is the float model, without quantization and adapters."""
    modules = [module for _, module in fake_quant_modules(model)]
    for module in modules:
        module.bypassed = True
    try:
        yield
    finally:
        for module in modules:
            module.bypassed = False


def check_finite(model: nn.Module) -> None:
    """Refuse a model whose training diverged; its codes would be garbage.

    Raises:
        SchemeError: Naming the first parameter of a module to be quantized that is NaN or infinite.
    """
    for name, module in fake_quant_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise SchemeError(
                    f"{name}.{key} is NaN or infinite after training; lower the learning rate, or start from an "
                    "earlier checkpoint"
                )

"""Bits by budget for a model in memory: which layers are chosen for, and what is recorded of it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers.utils import logging

from hfquant.formats.engines import FUSED
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.roles import model_roles
from hfquant.nn.packed_module import FloatWeight, packed_bytes
from hfquant.nn.select import Selection, packed_class
from hfquant.ptq.allocate import Allocation, Budget, allocate_
from hfquant.ptq.sensitivity import Measured, measure_sensitivity
from hfquant.ptq.store import Store
from hfquant.schemes import LayerScheme


logger = logging.get_logger(__name__)

PART = "allocation"
"""Name of the allocation among the finished parts of a run."""


def allocate_bits_(
    model: nn.Module,
    selection: Selection,
    config: HfQuantConfig,
    budget: Budget,
    batches: Sequence[Any] | None,
    *,
    resume: Store | None,
    progress: bool,
) -> dict[str, Any]:
    """Replace the schemes of the linear layers in ``selection`` by those that lose the least within ``budget``.

    Args:
        model: Float model in memory.
        selection: Its schemes are replaced.
        config: Says which layers are settled already, and whether the group size is.
        budget: What to keep to.
        batches: Calibration data; without it the errors of the weights decide.
        resume: Keeps the outcome, or has that of an interrupted run.
        progress: Show progress bars.

    Returns:
        What is recorded of it.

    Raises:
        ConfigError: If the budget cannot be kept.
    """
    found = None if resume is None else resume.load(PART)
    if found is not None:
        record = found[1]
        selection.schemes |= {name: LayerScheme.parse(text) for name, text in record.pop("schemes").items()}
        return record
    units = allocated_units(model, selection, config)
    measured = None
    if batches is not None:
        weights = {key: weight for name in sum(units, ()) for key, weight in float_weights(model, name)}
        measured = measure_sensitivity(model, weights, batches, seed=config.seed or 0, progress=progress)
        units = _reached(model, units, measured)
    made = allocate_(
        model,
        selection,
        units,
        budget,
        measured,
        fixed_bytes=fixed_bytes(model, selection, sum(units, ())),
        group_size=config.group_size,
        progress=progress,
    )
    if resume is not None:
        resume.save(PART, {}, asdict(made))
    return _record(made)


def _reached(model: nn.Module, units: list[tuple[str, ...]], measured: Measured) -> list[tuple[str, ...]]:
    """Without layers that the measured output does not depend on: they keep the scheme they have without a budget."""
    moved = {key for key, factors in measured.factors.items() if bool(factors[1].any())}
    reached = [unit for unit in units if any(key in moved for name in unit for key, _ in float_weights(model, name))]
    for unit in units:
        if unit not in reached:
            logger.warning(f"hfquant: {', '.join(unit)}: no calibration data reaches it; its bits are not chosen")
    return reached


def _record(made: Allocation) -> dict[str, Any]:
    return {key: value for key, value in asdict(made).items() if key != "schemes"}


def allocated_units(model: nn.Module, selection: Selection, config: HfQuantConfig) -> list[tuple[str, ...]]:
    """The layers to choose for; those that serving engines fuse into one matrix (query, key, value) stay together."""
    roles, settings = model_roles(model), config.resolve()
    shared = {*roles.embeddings, *roles.heads, *selection.ties, *selection.ties.values()}
    pinned = [o.pattern for o in settings.overrides if o.bits is not None or o.group_size is not None]
    names = [n for n in selection.schemes if n not in shared and not any(p.matches(n) for p in pinned)]
    units: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        fused = next((members for members in FUSED if own in members), (own,))
        units.setdefault((parent, *fused, str(selection.schemes[name])), []).append(name)
    return [tuple(unit) for unit in units.values()]


def fixed_bytes(model: nn.Module, selection: Selection, allocated: Iterable[str]) -> int:
    """Bytes of everything that will be stored beside the layers called ``allocated``."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    total, free = 0, set(allocated)
    for name, scheme in selection.schemes.items():
        for key, weight in float_weights(model, name):
            parameter = parameters.pop(id(model.get_parameter(key)), None)
            if parameter is not None and name not in free:
                total += packed_bytes(weight, scheme)
    return total + sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def float_weights(model: nn.Module, name: str) -> list[tuple[str, FloatWeight]]:
    """Full name and shape of each float parameter that the module ``name`` will have packed."""
    module = model.get_submodule(name)
    target = packed_class(module)
    assert target is not None
    return [(f"{name}.{key}", weight) for key, weight in target.weights_of(module).items()]

"""Bits and groups for each layer, so that a model of a given size loses as little as possible.

Each layer has a few options, each with its size and what it costs. Choosing one for every layer under a budget is the
multiple-choice knapsack problem. It is solved by dynamic programming over the bytes beyond the smallest options
(Kellerer, Pferschy and Pisinger 2004, section 11.5), exactly where these bytes, in units of their common divisor, fit
``CELLS``; else sizes are rounded up to a coarser unit, so that the budget is kept in any case.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import ConfigError
from hfquant.nn.packed_module import packed_bytes
from hfquant.nn.select import Selection, packed_class
from hfquant.numerics.affine import fake_quantize, split_groups
from hfquant.ptq.quantize_weight import check_finite
from hfquant.ptq.search import choose_by_search
from hfquant.ptq.sensitivity import Measured
from hfquant.schemes import AUTO_GROUP_SIZES, LayerScheme, WeightScheme


CELLS = 1 << 19
"""Sizes that the dynamic programme tells apart."""

SMALLEST_GROUP = 32
"""Smaller groups are considered only where none else divides: servers' kernels have none, and 8 bits do more."""

PROBED_WEIGHTS = 1 << 20
"""Weights of a matrix that errors are measured on: whole rows, evenly spread."""


@dataclass(frozen=True)
class Budget:
    """What an allocation has to keep to; one of the three.

    Attributes:
        bits: Average bits per weight of the layers that are allocated, scales and zero points included.
        size: Bytes of all tensors that will be stored.
        error: Estimated loss: mean KL in nats, relative squared error of the output, or noise to signal of the weights.
    """

    bits: float | None = None
    size: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Option:
    """One way to store the layers of a unit.

    Attributes:
        weight: Bits and group.
        bytes: Of all tensors of these layers.
        error: What it costs, in the unit of the sensitivity.
    """

    weight: WeightScheme
    bytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        kind: What errors are measured in: ``"kl"``, ``"relative error"`` or ``"weights"``.
        bits: Average bits per weight of the allocated layers.
        bytes: Of the allocated layers.
        error: Estimated loss of the choice.
        schemes: Layer -> scheme.
    """

    kind: str
    bits: float
    bytes: int
    error: float
    schemes: Mapping[str, str]


def solve(options: Sequence[Sequence[Option]], capacity: int) -> list[Option]:
    """One option for each unit, with the least total error within ``capacity`` bytes.

    Raises:
        ConfigError: If the smallest options take more.
    """
    fronts = [pareto(unit) for unit in options]
    least = sum(front[0].bytes for front in fronts)
    if least > capacity:
        raise ConfigError(f"the layers take at least {least} bytes, {capacity} are allowed")
    room = min(capacity, sum(front[-1].bytes for front in fronts)) - least
    _, choices, unit = _programme(fronts, room)
    return _traced(fronts, choices, room // unit, unit)


def solve_for_error(options: Sequence[Sequence[Option]], bound: float) -> list[Option]:
    """One option for each unit, with the fewest bytes whose total error is at most ``bound``.

    Raises:
        ConfigError: If no choice is that good.
    """
    fronts = [pareto(unit) for unit in options]
    room = sum(front[-1].bytes - front[0].bytes for front in fronts)
    best, choices, unit = _programme(fronts, room)
    if float(best[-1]) > bound:
        raise ConfigError(f"the estimated error is at least {float(best[-1]):.3g}, {bound:.3g} is allowed")
    return _traced(fronts, choices, int((best <= bound).nonzero()[0]), unit)


def pareto(unit: Sequence[Option]) -> list[Option]:
    """The options that are not both larger and worse than another, by rising size."""
    front: list[Option] = []
    for option in sorted(unit, key=lambda o: (o.bytes, o.error)):
        if not front or option.error < front[-1].error:
            front.append(option)
    return front


def _programme(fronts: Sequence[Sequence[Option]], room: int) -> tuple[Tensor, list[Tensor], int]:
    """Least error for each number of units beyond the smallest options, the choices behind it, and bytes in a unit."""
    steps = [option.bytes - front[0].bytes for front in fronts for option in front]
    unit = max(gcd(*steps), ceil(room / (CELLS - 1)), 1)
    cells = room // unit + 1
    best, choices = torch.zeros(cells, dtype=torch.float64), []
    for front in fronts:
        after = torch.full((cells,), float("inf"), dtype=torch.float64)
        choice = torch.zeros(cells, dtype=torch.uint8)
        for index, option in enumerate(front):
            shift = _units(option, front, unit)
            if shift >= cells:
                continue
            reached = best[: cells - shift] + option.error
            better = reached < after[shift:]
            after[shift:] = torch.where(better, reached, after[shift:])
            choice[shift:][better] = index
        best = after
        choices.append(choice)
    return best, choices, unit


def _units(option: Option, front: Sequence[Option], unit: int) -> int:
    return -(-(option.bytes - front[0].bytes) // unit)


def _traced(fronts: Sequence[Sequence[Option]], choices: Sequence[Tensor], cell: int, unit: int) -> list[Option]:
    chosen = []
    for front, choice in zip(reversed(fronts), reversed(choices), strict=True):
        option = front[int(choice[cell])]
        cell -= _units(option, front, unit)
        chosen.append(option)
    return chosen[::-1]


def candidates(module: nn.Module, scheme: LayerScheme, group_size: int | None) -> list[WeightScheme]:
    """What can be chosen for ``module``: 4 bits in groups of every size that divides its inputs, and 8 bits.

    Args:
        module: The float module.
        scheme: What it would have without a budget; symmetry stays.
        group_size: The only group size to consider, if the user asked for one; -1 means one scale per channel.
    """
    target = packed_class(module)
    assert target is not None
    inputs = {weight.in_features for weight in target.weights_of(module).values()}
    common, symmetric = gcd(*inputs), scheme.weight.symmetric
    if group_size is not None:
        size = None if group_size == -1 or inputs == {group_size} else group_size
        return [WeightScheme(4, size, symmetric), WeightScheme(8, size, symmetric)]
    fitting = [size for size in AUTO_GROUP_SIZES if common % size == 0]
    wide = [size for size in fitting if size >= SMALLEST_GROUP] or fitting or [-1]
    sizes = [None if size == -1 or inputs == {size} else size for size in wide]
    return [*(WeightScheme(4, size, symmetric) for size in sizes), WeightScheme(8, None, symmetric)]


def measure_options(
    model: nn.Module,
    unit: Sequence[str],
    weights: Iterable[WeightScheme],
    selection: Selection,
    measured: Measured | None,
) -> list[Option]:
    """Size and error of each of ``weights`` for the layers of ``unit`` together.

    Args:
        model: Float model in memory.
        unit: Names of layers that get the same scheme.
        weights: The candidates.
        selection: Schemes of the layers, of which only bits and group change.
        measured: Sensitivities of the parameters; without them errors are relative to the energy of the weights.
    """
    options = []
    for weight in weights:
        size, error = 0, 0.0
        for name in unit:
            module = model.get_submodule(name)
            target = packed_class(module)
            assert target is not None
            for key, shape in target.weights_of(module).items():
                size += packed_bytes(shape, replace(selection.schemes[name], weight=weight))
                factors = None if measured is None else measured.factors[f"{name}.{key}"]
                error += matrix_error(shape.to_rows(module.get_parameter(key)), weight, factors, f"{name}.{key}")
        options.append(Option(weight, size, error))
    return options


@torch.no_grad()
def matrix_error(rows: Tensor, scheme: WeightScheme, factors: tuple[Tensor, Tensor] | None, name: str) -> float:
    """What it costs to store ``rows [..., N, K]`` in ``scheme``, estimated on some of them.

    Raises:
        SchemeError: If they hold NaN or infinity.
    """
    step = max(1, rows.numel() // PROBED_WEIGHTS)
    values = rows.detach()[..., ::step, :].float()
    check_finite(values, name)
    groups = split_groups(values, scheme.group_size)
    scale, zero = choose_by_search(groups, scheme)
    shift = None if zero is None else zero.unsqueeze(-1)
    squared = (fake_quantize(groups, scale.unsqueeze(-1), shift, bits=scheme.bits) - groups).square().view(values.shape)
    if factors is None:
        energy = values.square().sum(dtype=torch.float64).clamp_min(1e-30)
        return float(squared.sum(dtype=torch.float64) / energy)
    by_row, by_column = factors[0][..., ::step], factors[1]
    cost = torch.einsum("...nk,...k,...n->", squared, by_column, by_row)
    return float(cost) * rows.shape[-2] / values.shape[-2]


def allocate_(
    model: nn.Module,
    selection: Selection,
    units: Sequence[Sequence[str]],
    budget: Budget,
    measured: Measured | None,
    *,
    fixed_bytes: int,
    group_size: int | None,
    progress: bool,
) -> Allocation:
    """Give the layers of ``units`` the schemes that lose the least within ``budget``.

    Args:
        model: Float model in memory.
        selection: Its schemes are replaced.
        units: Layers to choose for; those of one unit get the same bits and group.
        budget: What to keep to.
        measured: Sensitivities, if there is calibration data.
        fixed_bytes: Of everything else that will be stored.
        group_size: The only group size to consider, if the user asked for one.
        progress: Show a progress bar.

    Raises:
        ConfigError: If the budget cannot be kept; says what can.
    """
    options = [
        measure_options(
            model,
            unit,
            candidates(model.get_submodule(unit[0]), selection.schemes[unit[0]], group_size),
            selection,
            measured,
        )
        for unit in tqdm(units, desc="Weighing", unit="layer", disable=not progress)
    ]
    weights = sum(_numel(model, name) for unit in units for name in unit)
    chosen = _solve(options, budget, weights, fixed_bytes)
    for unit, option in zip(units, chosen, strict=True):
        for name in unit:
            selection.schemes[name] = replace(selection.schemes[name], weight=option.weight)
    total = sum(option.bytes for option in chosen)
    schemes = {name: str(selection.schemes[name]) for unit in units for name in unit}
    kind = "weights" if measured is None else measured.kind
    return Allocation(kind, 8 * total / weights, total, sum(option.error for option in chosen), schemes)


def _solve(options: Sequence[Sequence[Option]], budget: Budget, weights: int, fixed_bytes: int) -> list[Option]:
    if budget.error is not None:
        try:
            return solve_for_error(options, budget.error)
        except ConfigError as error:
            raise ConfigError(f"target_error={budget.error}: {error}; give more, or keep layers in float") from None
    least, most = (sum(pick(o.bytes for o in unit) for unit in options) for pick in (min, max))
    if budget.size is not None:
        if least + fixed_bytes > budget.size:
            raise ConfigError(
                f"target_size={budget.size}: the model takes {least + fixed_bytes} to {most + fixed_bytes} bytes, "
                f"{fixed_bytes} of them outside of what is chosen for; give more, or a smaller embedding_bits"
            )
        return solve(options, budget.size - fixed_bytes)
    assert budget.bits is not None
    if 8 * least > budget.bits * weights:
        bits = f"{8 * least / weights:.4g} to {8 * most / weights:.4g}"
        raise ConfigError(f"target_bits={budget.bits}: with their scales the layers take {bits} bits per weight")
    return solve(options, int(budget.bits * weights / 8))


def _numel(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    target = packed_class(module)
    assert target is not None
    return sum(weight.numel for weight in target.weights_of(module).values())

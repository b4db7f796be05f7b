"""SmoothQuant: outliers of activations move into the weights, where a norm or a linear layer can take them up.

With ``s`` per input, ``x W^T = (x / s) (W s)^T``: the division goes into whatever produced ``x``, so the float block
computes the same. What can take it up is not read off the architecture but tried: a fold is used only if the block's
output stays what it was.

References:
    Xiao et al. 2022, eq. 4. https://arxiv.org/abs/2211.10438
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.nn.select import packed_class
from hfquant.numerics.affine import choose_row_scale, choose_row_scale_and_zero_point, fake_quantize, split_groups
from hfquant.numerics.observers import choose_input_scale
from hfquant.ptq.quantize_weight import ScaleChooser
from hfquant.ptq.rtn import choose_rtn
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.schemes import LayerScheme


ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Tried for each fold, beside leaving it alone: the share of the outliers that goes to the weights."""

PROBE_ROWS = 512
"""Rows of activations an alpha is judged on."""

SAME_OUTPUT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative change of the block's output up to which a fold counts as exact."""


@dataclass(frozen=True)
class Fold:
    """A module whose output goes to ``consumers`` alone, channel by channel.

    Attributes:
        producer: A norm, or a linear layer.
        consumers: Layers that read its output.
    """

    producer: nn.Module
    consumers: tuple[str, ...]


@torch.no_grad()
def find_folds(block: nn.Module, run: Callable[[], Tensor], layers: Mapping[str, nn.Module]) -> list[Fold]:
    """Folds that leave what ``run`` returns unchanged, for the linear layers in ``layers``."""
    before, order, inputs = _watched(block, run, layers)
    groups: dict[int, list[str]] = {}
    for name, x in inputs.items():
        groups.setdefault(id(x), []).append(name)
    folds = []
    for names in groups.values():
        first = min(order.index(layers[name]) for name in names)
        wide = inputs[names[0]].shape[-1]
        for producer in reversed([m for m in order[:first] if _makes(m, wide)]):
            fold = Fold(producer, tuple(names))
            if _is_exact(fold, layers, run, before, wide):
                folds.append(fold)
                break
    return folds


def _watched(
    block: nn.Module, run: Callable[[], Tensor], layers: Mapping[str, nn.Module]
) -> tuple[Tensor, list[nn.Module], dict[str, Tensor]]:
    """What the block returns, its modules in the order they ran, and the inputs of ``layers``."""
    order: list[nn.Module] = []
    inputs: dict[str, Tensor] = {}
    names = {id(module): name for name, module in layers.items()}

    def hook(module: nn.Module, args: Any) -> None:
        order.append(module)
        if id(module) in names and args:
            inputs[names[id(module)]] = args[0]

    weighted = [module for module in block.modules() if isinstance(module._parameters.get("weight"), Tensor)]
    handles = [module.register_forward_pre_hook(hook) for module in weighted]
    try:
        return run(), order, inputs
    finally:
        for handle in handles:
            handle.remove()


def _makes(module: nn.Module, features: int) -> bool:
    """Whether ``module`` is a norm or linear layer with ``features`` outputs that can be scaled."""
    weight = module._parameters["weight"]
    assert weight is not None
    is_norm = weight.ndim == 1 and "norm" in type(module).__name__.lower()
    return weight.is_floating_point() and weight.shape[0] == features and (is_norm or isinstance(module, nn.Linear))


def _is_exact(
    fold: Fold, layers: Mapping[str, nn.Module], run: Callable[[], Tensor], before: Tensor, features: int
) -> bool:
    touched = [fold.producer, *(layers[name] for name in fold.consumers)]
    kept = [(parameter, parameter.clone()) for module in touched for parameter in module.parameters()]
    factors = torch.linspace(0.5, 2, features, device=before.device)[torch.randperm(features, generator=_generator())]
    apply_fold_(fold, layers, factors)
    change = float((run() - before).float().norm() / before.float().norm().clamp_min(1e-12))
    for parameter, value in kept:
        parameter.copy_(value)
    return change < SAME_OUTPUT[before.dtype]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def apply_fold_(fold: Fold, layers: Mapping[str, nn.Module], factors: Tensor) -> None:
    """Divide the producer's outputs by ``factors [K]`` and multiply the consumers' inputs by them, in place."""
    for parameter in fold.producer._parameters.values():
        if parameter is not None:
            parameter.div_(factors.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype))
    for name in fold.consumers:
        module = layers[name]
        target = packed_class(module)
        assert target is not None
        for key, weight in target.weights_of(module).items():
            weight.to_rows(module.get_parameter(key)).mul_(factors.to(module.get_parameter(key).dtype))


@torch.no_grad()
def smooth_(
    folds: Sequence[Fold],
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    found: Mapping[WeightKey, InputStatistics],
    observer: str,
) -> dict[str, float]:
    """Apply to each fold the alpha with the least error of its consumers' outputs, if it beats leaving it alone.

    Returns:
        Layer name -> alpha, for the layers that were smoothed.
    """
    chosen: dict[str, float] = {}
    for fold in folds:
        statistics = found.get(WeightKey(fold.consumers[0], "weight"))
        quantized = [name for name in fold.consumers if schemes[name].activation is not None]
        if statistics is None or len(quantized) != len(fold.consumers) or not statistics.sample.shape[0]:
            continue
        weights = [rows_of(layers[name]).float() for name in fold.consumers]
        scheme = schemes[fold.consumers[0]]
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        best, best_error, best_alpha = None, output_error(statistics, weights, scheme, observer, None), 0.0
        for alpha in ALPHAS:
            factors = smoothing(statistics.absmax, largest, alpha)
            error = output_error(statistics, weights, scheme, observer, factors)
            if error < best_error:
                best, best_error, best_alpha = factors, error, alpha
        if best is not None:
            apply_fold_(fold, layers, best)
            statistics.rescale_(best)
            chosen |= dict.fromkeys(fold.consumers, best_alpha)
    return chosen


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Factors ``max|x|^alpha / max|w|^(1 - alpha) [K]`` of the largest magnitudes ``[K]``, 1 where either is zero."""
    factors = inputs.clamp_min(1e-5) ** alpha / weights.clamp_min(1e-5) ** (1 - alpha)
    factors = factors / factors.log().mean().exp()  # their geometric mean changes nothing
    return torch.where((inputs == 0) | (weights == 0), torch.ones_like(factors), factors.clamp(1e-3, 1e3))


def rows_of(module: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a float linear layer."""
    target = packed_class(module)
    assert target is not None
    return target.weights_of(module)["weight"].to_rows(module.get_parameter("weight")).detach()


def output_error(
    statistics: InputStatistics,
    weights: Sequence[Tensor],
    scheme: LayerScheme,
    observer: str,
    factors: Tensor | None,
    choose: ScaleChooser = choose_rtn,
) -> float:
    """Squared error of the outputs of layers that read one tensor, after they are quantized.

    Args:
        statistics: Of their inputs.
        weights: Of the layers, each ``[N, K]``, float32.
        scheme: Of the layers.
        observer: What chooses static ranges.
        factors: Inputs are divided and weights multiplied by them ``[K]`` before; ``None`` stands for ones.
        choose: What chooses the scales of weights.
    """
    step = -(-statistics.sample.shape[0] // PROBE_ROWS)
    x = statistics.sample[::step]
    scaled = x if factors is None else x / factors
    absmax = statistics.absmax if factors is None else statistics.absmax / factors
    coarse = round_activations(scaled, scheme, absmax.amax(), observer)
    total = 0.0
    for weight in weights:
        w = weight if factors is None else weight * factors
        groups = split_groups(w, scheme.weight.group_size)
        scale, zero = choose(groups, scheme.weight)
        shift = None if zero is None else zero.unsqueeze(-1)
        rounded = fake_quantize(groups, scale.unsqueeze(-1), shift, bits=scheme.weight.bits)
        total += float((x @ weight.t() - coarse @ rounded.view_as(w).t()).square().sum(dtype=torch.float64))
    return total


def round_activations(x: Tensor, scheme: LayerScheme, absmax: Tensor, observer: str) -> Tensor:
    """What a layer of ``scheme`` multiplies with instead of ``x [S, K]``."""
    if scheme.activation is None:
        return x
    if scheme.activation.dynamic and scheme.activation.symmetric:
        return fake_quantize(x, choose_row_scale(x), bits=8)
    if scheme.activation.dynamic:
        return fake_quantize(x, *choose_row_scale_and_zero_point(x), bits=8)
    return fake_quantize(x, choose_input_scale(x, absmax, observer), bits=8)

"""SmoothQuant: outliers of activations move into the weights, where a norm or a linear layer can take them up.

With ``s`` per input, ``x W^T = (x / s) (W s)^T``: the division goes into whatever produced ``x``, so the float block
computes the same. What can take it up is not read off the architecture but tried: a fold is used only if the block's
output stays what it was.

References:
    Xiao et al. 2022, eq. 4. https://arxiv.org/abs/2211.10438
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.nn.select import packed_class
from hfquant.numerics.affine import choose_row_scale, choose_row_scale_and_zero_point, fake_quantize, split_groups
from hfquant.numerics.observers import choose_input_scale
from hfquant.ptq.quantize_weight import ScaleChooser
from hfquant.ptq.rtn import choose_rtn
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.schemes import ActivationScheme, LayerScheme


ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Tried for each fold, beside leaving it alone: the share of the outliers that goes to the weights."""

LEVELLED = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Tried too: the shares of inputs, those with the largest magnitudes, that are brought to one level."""

PROBE_ROWS = 1024
"""Rows of activations that factors are judged on."""

LOWEST_DB = 15.0
"""INT8 activations are kept where the output of the median token has at least this signal to noise ratio: noise of 3 %
of the signal's energy. Below it a static layer takes dynamic ones, and where those do not reach it either, activations
stay in 16 bit. A token with outliers must not hide what they cost the others, so it is the median and not the sum."""

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
) -> dict[str, str]:
    """Apply to each fold the factors with the least error of its consumers' outputs, if they beat leaving it alone.

    Factors and static ranges from the rows to calibrate on are judged on those that are held out: an input that is
    rarely large looks small, is enlarged, and then saturates elsewhere. What is chosen is applied as all rows have it.
    Layers that no factors make good enough for static activations get those for dynamic ones, which they will take.

    Returns:
        Layer name -> what was done, for the layers that were smoothed.
    """
    chosen: dict[str, str] = {}
    for fold in folds:
        statistics = found.get(WeightKey(fold.consumers[0], "weight"))
        quantized = [name for name in fold.consumers if schemes[name].activation is not None]
        if statistics is None or len(quantized) != len(fold.consumers) or not statistics.all_samples().shape[0]:
            continue
        weights = [rows_of(layers[name]).float() for name in fold.consumers]
        fitted = statistics.fitted_absmax if statistics.rows else statistics.absmax
        candidates = candidate_factors(fitted, weights)
        scheme = schemes[fold.consumers[0]]
        errors = {label: _error(statistics, weights, scheme, observer, f) for label, f in candidates.items()}
        if scheme.quantization_type == "static" and min(errors.values()) > len(weights) * 10 ** (-LOWEST_DB / 10):
            dynamic = replace(scheme, activation=ActivationScheme(dynamic=True))
            errors = {label: _error(statistics, weights, dynamic, observer, f) for label, f in candidates.items()}
        best = min(errors, key=errors.__getitem__)
        factors = candidate_factors(statistics.absmax, weights)[best]
        if factors is not None:
            apply_fold_(fold, layers, factors)
            statistics.rescale_(factors)
            chosen |= dict.fromkeys(fold.consumers, best)
    return chosen


def candidate_factors(inputs: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """What is tried for inputs of these largest magnitudes ``[K]`` and ``weights [N, K]``, ``None`` for nothing."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    candidates: dict[str, Tensor | None] = {"": None}
    candidates |= {f"alpha {alpha:.1f}": smoothing(inputs, largest, alpha) for alpha in ALPHAS}
    return candidates | {f"largest {100 * share:.0f} % to one level": levelling(inputs, share) for share in LEVELLED}


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Factors ``max|x|^alpha / max|w|^(1 - alpha) [K]`` of the largest magnitudes ``[K]``, 1 where either is zero."""
    factors = inputs.clamp_min(1e-5) ** alpha / weights.clamp_min(1e-5) ** (1 - alpha)
    factors = factors / factors.log().mean().exp()  # their geometric mean changes nothing
    return torch.where((inputs == 0) | (weights == 0), torch.ones_like(factors), factors.clamp(1e-3, 1e3))


def levelling(inputs: Tensor, share: float) -> Tensor:
    """Factors ``[K]``, at least 1, that bring the ``share`` of inputs with the largest magnitudes ``[K]`` to one.

    The others, among them the ones that were rarely active during calibration, stay as they are.
    """
    level = inputs.kthvalue(max(1, int(inputs.numel() * (1 - share)))).values.clamp_min(1e-5)
    return (inputs / level).clamp(1, 1e3)


def rows_of(module: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a float linear layer."""
    target = packed_class(module)
    assert target is not None
    return target.weights_of(module)["weight"].to_rows(module.get_parameter("weight")).detach()


def probed(rows: Tensor) -> Tensor:
    """At most ``PROBE_ROWS`` of ``rows [S, K]``, evenly spread."""
    return rows[:: -(-rows.shape[0] // PROBE_ROWS)]


def _error(
    statistics: InputStatistics, weights: Sequence[Tensor], scheme: LayerScheme, observer: str, factors: Tensor | None
) -> float:
    """Mean over tokens of the squared error of their outputs.

    A token whose output is larger than that of most counts in proportion to it: one with outliers must not decide for
    all. One with a smaller output does not: it changes little.
    """
    fitted, absmax = statistics.sample, statistics.fitted_absmax
    if not statistics.rows:
        fitted, absmax = statistics.held_sample, statistics.absmax
    x = probed(statistics.held_sample if statistics.held_rows else fitted)
    if factors is not None:
        fitted, absmax = fitted / factors, absmax / factors
    input_scale = choose_input_scale(fitted, absmax.amax(), observer)
    noises = output_noise(x, weights, scheme, factors, input_scale=input_scale)
    signals = ((x @ weight.t()).square().sum(-1) for weight in weights)
    pairs = zip(noises, signals, strict=True)
    return sum(float((n / s.maximum(s.median()).clamp_min(1e-30)).mean()) for n, s in pairs)


def output_noise(
    x: Tensor,
    weights: Sequence[Tensor],
    scheme: LayerScheme,
    factors: Tensor | None,
    choose: ScaleChooser = choose_rtn,
    input_scale: Tensor | None = None,
) -> list[Tensor]:
    """Squared error ``[S]`` of what each token gets from layers that read one tensor, after they are quantized.

    Args:
        x: Their inputs ``[S, K]``.
        weights: Of the layers, each ``[N, K]``, float32.
        scheme: Of the layers.
        factors: Inputs are divided and weights multiplied by them ``[K]`` before; ``None`` stands for ones.
        choose: What chooses the scales of weights.
        input_scale: Of static activations, after the division.
    """
    coarse = round_activations(x if factors is None else x / factors, scheme, input_scale)
    noises = []
    for weight in weights:
        w = weight if factors is None else weight * factors
        groups = split_groups(w, scheme.weight.group_size)
        scale, zero = choose(groups, scheme.weight)
        shift = None if zero is None else zero.unsqueeze(-1)
        rounded = fake_quantize(groups, scale.unsqueeze(-1), shift, bits=scheme.weight.bits)
        noises.append((x @ weight.t() - coarse @ rounded.view_as(w).t()).square().sum(-1))
    return noises


def round_activations(x: Tensor, scheme: LayerScheme, input_scale: Tensor | None) -> Tensor:
    """What a layer of ``scheme`` multiplies with instead of ``x [S, K]``; ``input_scale`` is that of static ones."""
    if scheme.activation is None:
        return x
    if scheme.activation.dynamic and scheme.activation.symmetric:
        return fake_quantize(x, choose_row_scale(x), bits=8)
    if scheme.activation.dynamic:
        return fake_quantize(x, *choose_row_scale_and_zero_point(x), bits=8)
    assert input_scale is not None
    return fake_quantize(x, input_scale, bits=8)

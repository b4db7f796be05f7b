"""Activation-aware equalisation: large inputs get finer weights, where a norm or a linear layer can absorb that.

With ``s`` per input, ``x W^T = (x / s) (W s)^T``: a weight that is multiplied by ``s`` before it is rounded has an
error ``s`` times smaller in the output. The factors are ``s = mean|x|^alpha``, and alpha is searched for each fold: the
layers that read one tensor, and what makes it (``ptq/smoothquant.py`` finds them). Every alpha is judged with the
weighted scale search, which the weights get afterwards.

References:
    Lin et al. 2023, eq. 4 and 5. https://arxiv.org/abs/2306.00978
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hfquant.numerics.affine import split_groups
from hfquant.ptq.quantize_weight import ScaleChooser
from hfquant.ptq.smoothquant import Fold, apply_fold_, output_error, rows_of
from hfquant.ptq.statistics import InputStatistics, WeightKey
from hfquant.ptq.weighted_search import choose_weighted
from hfquant.schemes import LayerScheme


ALPHAS = tuple(0.1 * step for step in range(1, 10))
"""Tried for each fold, beside leaving it alone."""

PROBED_WEIGHTS = 1 << 18
"""Weights of each matrix that an alpha is judged on: whole rows, evenly spread."""


@torch.no_grad()
def equalize_(
    folds: Sequence[Fold],
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    found: Mapping[WeightKey, InputStatistics],
) -> dict[str, float]:
    """Apply to each fold of layers with float activations the alpha with the least error of their outputs.

    Args:
        folds: What can absorb factors.
        layers: Float layers of a block by name; they and the producers are changed in place.
        schemes: Of the layers.
        found: Statistics of their inputs, which are rescaled too.

    Returns:
        Layer name -> alpha, for the layers that were equalised.
    """
    chosen: dict[str, float] = {}
    for fold in folds:
        statistics, first = found.get(WeightKey(fold.consumers[0], "weight")), schemes[fold.consumers[0]]
        plain = all(schemes[name].activation is None for name in fold.consumers)
        if statistics is None or not plain or not statistics.sample.shape[0]:
            continue
        weights = [_probed(rows_of(layers[name])) for name in fold.consumers]
        candidates = [(0.0, None), *((alpha, equalizing(statistics.sample, alpha)) for alpha in ALPHAS)]
        errors = [
            output_error(statistics, weights, first, "minmax", factors, _weighted(statistics, first, factors))
            for _, factors in candidates
        ]
        alpha, best = candidates[errors.index(min(errors))]
        if best is not None:
            apply_fold_(fold, layers, best)
            statistics.rescale_(best)
            chosen |= dict.fromkeys(fold.consumers, alpha)
    return chosen


def _probed(weight: Tensor) -> Tensor:
    return weight[:: max(1, weight.numel() // PROBED_WEIGHTS)].float()


def _weighted(statistics: InputStatistics, scheme: LayerScheme, factors: Tensor | None) -> ScaleChooser:
    """The scale search that weights get after ``factors`` were applied."""
    importance = (statistics.hessian if statistics.rows else statistics.held_out).diagonal()
    if factors is not None:
        importance = importance / factors.square()
    groups = split_groups(importance, scheme.weight.group_size)
    return lambda weights, weight_scheme: choose_weighted(weights, weight_scheme, groups)


def equalizing(sample: Tensor, alpha: float) -> Tensor:
    """Factors ``mean|x|^alpha [K]`` of inputs ``[S, K]``, around 1; 1 where an input is always zero."""
    mean = sample.abs().mean(0)
    factors = mean.clamp_min(1e-8) ** alpha
    used = factors[mean > 0]
    middle = (used.max() * used.min()).sqrt() if used.numel() else 1.0
    return torch.where(mean == 0, torch.ones_like(mean), (factors / middle).clamp(1e-3, 1e3))

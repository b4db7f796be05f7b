"""The adapter ``"scales"``: only the size of the steps trains, exactly; the codes stay.

References:
    Kim et al. 2023 (PEQA), https://arxiv.org/abs/2305.14152; Chen et al. 2025 (EfficientQAT), section 3.3,
    https://arxiv.org/abs/2407.11062.
"""

from collections.abc import Iterable

from torch import nn

from hfquant.finetune.adapted import ADAPTED_AS
from hfquant.nn.packed_module import PackedModule


def train_scales_(model: nn.Module, names: Iterable[str]) -> None:
    """Let the scales of the named packed modules train, in place: those of weights, and of static activations."""
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, PackedModule)
        ADAPTED_AS[type(module)].adapt_(module)

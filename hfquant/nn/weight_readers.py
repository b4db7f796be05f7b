"""Modules whose weight is read by the module that owns them: packed codes would be taken for the float weight there.

Mamba multiplies by ``self.dt_proj.weight`` itself, T5 casts its activations to ``self.wo.weight.dtype``, torch's
``TransformerEncoderLayer`` hands weights to a fused kernel. No hook sees such reads, but they stand in the source of
the owner's class.
"""

import functools
import inspect
import re

from torch import nn


NOT_COMPUTING = re.compile(r"_*(init|reset|tie|get|set|resize|save|load|prune|freeze|post_init)")
"""Methods that only set up, tie or save weights; what they read does not matter for the result."""

WEIGHT_READ = re.compile(r"\bself\.(\w+)(?:\[[^\]]*\])?\.weight\b(?!\.(?:device|is_meta|requires_grad)\b)")


def read_by_owner(model: nn.Module) -> dict[str, str]:
    """Module name -> class of the owner whose computation reads the weight of that module."""
    found = {}
    for name, owner in model.named_modules():
        for attribute in weights_read_by(type(owner)):  # type: ignore[arg-type]
            for child in _children(owner, attribute):
                found[f"{name}.{child}" if name else child] = type(owner).__name__
    return found


def _children(owner: nn.Module, attribute: str) -> list[str]:
    child = owner._modules.get(attribute)
    if isinstance(child, (nn.ModuleList, nn.Sequential)):
        return [f"{attribute}.{key}" for key in child._modules]
    return [] if child is None else [attribute]


@functools.cache
def weights_read_by(owner: type[nn.Module]) -> frozenset[str]:
    """Attributes of ``owner`` whose ``weight`` its methods read, by their source; none where there is no source."""
    names: set[str] = set()
    for base in owner.__mro__:
        if base is nn.Module:
            break
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not NOT_COMPUTING.match(name):
                names |= _reads(inspect.unwrap(method))
    return frozenset(names)


def _reads(method: object) -> set[str]:
    try:
        source = inspect.getsource(method)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return set()
    return set(WEIGHT_READ.findall(source))

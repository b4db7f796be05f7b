"""Modules whose weight is read by the module that owns them: packed codes would be taken for the float weight there.

Mamba multiplies by ``self.dt_proj.weight`` itself, T5 casts its activations to ``self.wo.weight.dtype``, Gemma 4 takes
a row of ``self.language_model.embed_tokens.weight``, torch's ``TransformerEncoderLayer`` hands weights to a fused
kernel. No hook sees such reads, but they stand in the source of the owner's class.
"""

import ast
import functools
import inspect
import re
import textwrap

from torch import nn


NOT_COMPUTING = re.compile(
    r"_*(init|reset|tie|set|resize|save|load|prune|freeze|post_init|get_(resized|dtype|device)|from_)"
)
"""Methods that only set up, tie or save weights; what they read does not matter for the result."""

HARMLESS = ("device", "is_meta", "requires_grad")
"""What does not depend on how a weight is stored."""

Read = tuple[bool, tuple[str, ...]]
"""``self.blocks[0].mlp.fc1.weight``: whether the way begins at the owner, and the way, without indices."""


def read_by_owner(model: nn.Module) -> dict[str, str]:
    """Module name -> class of the outermost owner whose computation reads the weight of that module."""
    found: dict[str, str] = {}
    for name, owner in model.named_modules():
        for from_self, way in weights_read_by(type(owner)):  # type: ignore[arg-type]
            if from_self:
                names = [f"{name}.{child}" if name else child for child in _children(owner, way)]
            else:
                names = _ending_in(model, way)
            for child in names:
                found.setdefault(child, type(owner).__name__)
    return found


def _children(owner: nn.Module, way: tuple[str, ...]) -> list[str]:
    """Names of the modules that ``way`` leads to: all items of a list on it."""
    if not way:
        return [""]
    child = owner._modules.get(way[0])
    if child is None:
        return []
    items = {"": child}
    if isinstance(child, (nn.ModuleList, nn.Sequential)):
        items = {f".{key}": item for key, item in child._modules.items() if item is not None}
    tails = [(key, tail) for key, item in items.items() for tail in _children(item, way[1:])]
    return [f"{way[0]}{key}.{tail}" if tail else f"{way[0]}{key}" for key, tail in tails]


def _ending_in(model: nn.Module, way: tuple[str, ...]) -> list[str]:
    """Names of the modules that some variable may stand for: of tables only where nothing but its name is known."""
    return [
        name
        for name, module in model.named_modules()
        if tuple(name.split("."))[-len(way) :] == way and (len(way) > 1 or isinstance(module, nn.Embedding))
    ]


@functools.cache
def weights_read_by(owner: type[nn.Module]) -> frozenset[Read]:
    """The modules whose ``weight`` the methods of ``owner`` read, by their source; none where there is no source."""
    reads: set[Read] = set()
    for base in owner.__mro__:
        if base is nn.Module:
            break
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not NOT_COMPUTING.match(name):
                reads |= _reads(inspect.unwrap(method))
    return frozenset(reads)


@functools.cache
def _reads(method: object) -> frozenset[Read]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    harmless = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in HARMLESS}
    ways = [
        _way(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in harmless
    ]
    # Of a variable: by its own name, or by what it holds.
    return frozenset((way[0] == "self", way[1:] or way) for way in ways if way and way != ("self",))


def _way(node: ast.expr) -> tuple[str, ...]:
    """Names of an expression like ``self.blocks[0].mlp``; empty for any other."""
    if isinstance(node, ast.Subscript):
        return _way(node.value)
    if isinstance(node, ast.Attribute):
        before = _way(node.value)
        return (*before, node.attr) if before else ()
    return (node.id,) if isinstance(node, ast.Name) else ()

"""Putting packed modules in place of float ones, and back."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hfquant.nn.packed_module import PackedModule
from hfquant.nn.select import packed_class
from hfquant.schemes import LayerScheme


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """All packed modules of ``model`` with their names."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def swap_modules_(model: nn.Module, schemes: Mapping[str, LayerScheme], ties: Mapping[str, str]) -> None:
    """Swap the named modules for packed ones in place; their packed parameters are not yet filled.

    Args:
        model: Float model, on any device (the meta device too).
        schemes: Module name -> scheme.
        ties: Module name -> module whose packed parameters it shares.
    """
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        target = packed_class(module)
        assert target is not None, f"{name} cannot be packed"
        target.swap_(module, scheme)
    tie_packed_(model, ties)


def tie_packed_(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Let each module in ``ties`` share the packed weight of the module it is tied to; its inputs are its own."""
    for name, owner in ties.items():
        source = model.get_submodule(owner)
        tied = model.get_submodule(name)
        for key in source._parameters:
            if key in tied._parameters and key not in ("bias", "input_scale"):
                tied._parameters[key] = source._parameters[key]


def restore_modules_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every packed module back into the float module it was, with dequantized weights.

    Modules that shared packed parameters share the float ones afterwards.
    """
    restored: dict[int, tuple[nn.Module, str]] = {}
    for _, module in list(packed_modules(model)):
        packed = {name: id(module._parameters[name]) for name in module.float_weights}
        module.restore_(dtype)
        for name, key in packed.items():
            if key in restored:
                owner, owner_name = restored[key]
                module._parameters[name] = owner._parameters[owner_name]
            else:
                restored[key] = (module, name)

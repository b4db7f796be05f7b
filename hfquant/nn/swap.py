"""Putting packed modules in place of float ones, and back."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hfquant.nn.fused import unfuse_modules_
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.select import packed_class
from hfquant.schemes import LayerScheme


DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model in which ``DistributedDataParallel`` finds names that it leaves alone."""


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

    Modules that shared packed parameters share the float ones afterwards. Fused modules are what they were, too.
    """
    unfuse_modules_(model)
    restored: dict[int, tuple[nn.Module, str]] = {}
    model.__dict__.pop(DDP_IGNORES, None)
    for _, module in list(packed_modules(model)):
        packed = {name: id(module._parameters[name]) for name in module.float_weights}
        module.restore_(dtype)
        for name, key in packed.items():
            if key in restored:
                owner, owner_name = restored[key]
                module._parameters[name] = owner._parameters[owner_name]
            else:
                restored[key] = (module, name)


def keep_packed_from_ddp_(model: nn.Module) -> None:
    """Let ``DistributedDataParallel`` leave packed parameters alone, which every process has from its checkpoint.

    They have no gradient, and neither gloo nor NCCL can send int16. A ``PeftModel`` around ``model`` knows its
    parameters by longer names, and asks ``model`` for this list all the same.
    """
    names = []
    for name, module in packed_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_floating_point():
                full = f"{name}.{key}" if name else key
                names += [full, f"base_model.model.{full}", f"base_model.model.{name}.base_layer.{key}"]
    model.__dict__.pop(DDP_IGNORES, None)
    if names:
        model.__dict__[DDP_IGNORES] = names

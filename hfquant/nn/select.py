"""Which modules of a model are quantized, with which scheme, and why the others are kept."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

from torch import nn

from hfquant.errors import ConfigError, SchemeError
from hfquant.nn.packed_module import PackedModule, is_supported
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_experts import QuantExperts
from hfquant.nn.quant_linear import QuantLinear
from hfquant.schemes import (
    LayerScheme,
    ModulePattern,
    QuantizationSettings,
    automatic_group_size,
    fitting_group_sizes,
    make_layer_scheme,
)


@dataclass(frozen=True)
class ModelRoles:
    """What the selection must know of a model beyond its modules.

    Attributes:
        embeddings: Names of input embeddings.
        heads: Names of output heads.
        ties: Parameter name -> name of the parameter it is tied to.
        float32: Modules that the model itself insists on keeping in float32.
        weight_readers: Module name -> class of the owner that reads its weight (``nn/weight_readers.py``).
    """

    embeddings: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()
    ties: Mapping[str, str] = field(default_factory=dict)
    float32: tuple[ModulePattern, ...] = ()
    weight_readers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Selection:
    """The decision for each module.

    Attributes:
        schemes: Module name -> scheme, for the modules to quantize.
        kept: Module name -> reason, for modules with weights of a kind that could be quantized.
        ties: Module name -> name of the module whose packed weight it shares.
    """

    schemes: dict[str, LayerScheme] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


ASKED = ("skip_modules", "overrides", "embedding_bits")
"""First words of the reasons that the user gave; ``strict`` accepts these only."""


def packed_class(module: nn.Module) -> type[PackedModule] | None:
    """The class that can stand for ``module`` on packed weights, if there is one."""
    if isinstance(module, PackedModule):
        return type(module)
    if _computes_its_weight(module):
        return None
    if QuantLinear.stands_for(module):
        return QuantLinear
    if QuantEmbedding.stands_for(module):
        return QuantEmbedding
    return QuantExperts if QuantExperts.stands_for(module) else None


def _computes_its_weight(module: nn.Module) -> bool:
    """Whether ``weight`` is no parameter but made from others before each forward (pruning, weight norm)."""
    return hasattr(module, "weight") and "weight" not in module._parameters


def select_modules(
    model: nn.Module, settings: QuantizationSettings, roles: ModelRoles, *, strict: bool = False
) -> Selection:
    """Decide for every module of ``model``, which may be on the meta device.

    Raises:
        SchemeError: If a group size that was asked for does not divide K; lists all such layers.
        ConfigError: If ``strict`` and a linear layer would be kept although nobody asked for it, or if nothing
            at all would be quantized.
    """
    modules = dict(model.named_modules())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    groups = tied_groups(modules, roles)
    selection, misfits = Selection(), []
    for name, module in modules.items():
        first = groups.get(name, (name,))[0]
        reason = group_keep_reason(name, modules, settings, roles, groups)
        if reason is not None:
            if has_quantizable_weight(module):
                selection.kept[name] = reason
            continue
        try:
            scheme = _scheme_for(first, modules, settings, roles, parameters)
        except SchemeError as error:
            misfits.append(f"{name}: {error}")
            continue
        selection.schemes[name] = scheme
        if name != first:
            selection.ties[name] = first
    _check(selection, modules, misfits, strict=strict)
    return selection


def _check(selection: Selection, modules: Mapping[str, nn.Module], misfits: list[str], *, strict: bool) -> None:
    if misfits:
        listed = "\n  ".join(misfits)
        raise SchemeError(f"the group size that was asked for does not divide the input of these layers:\n  {listed}")
    unasked = {
        name: reason
        for name, reason in selection.kept.items()
        if (isinstance(modules[name], nn.Linear) or has_expert_weights(modules[name])) and not reason.startswith(ASKED)
    }
    if strict and unasked:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in unasked.items())
        raise ConfigError(f"strict=True, and these linear layers would be kept in float:\n  {listed}")
    if not selection.schemes:
        raise ConfigError(
            "no module of this model would be quantized; look at skip_modules, overrides and embedding_bits"
        )


def has_quantizable_weight(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind whose being kept deserves a reason of its own."""
    if isinstance(module, (nn.Linear, nn.Embedding)) or has_expert_weights(module):
        return True
    return packed_class(module) is not None


def has_expert_weights(module: nn.Module) -> bool:
    """Whether ``module`` holds linear weights of several experts, in whatever layout."""
    return "Experts" in type(module).__name__ and any(
        parameter is not None and parameter.ndim == 3 for parameter in module._parameters.values()
    )


def group_keep_reason(
    name: str,
    modules: Mapping[str, nn.Module],
    settings: QuantizationSettings,
    roles: ModelRoles,
    groups: Mapping[str, tuple[str, ...]],
) -> str | None:
    """Why the module ``name`` stays in float, or one it shares its weight with; ``None`` if all are to be quantized."""
    members = groups.get(name, (name,))
    return next(filter(None, (keep_reason(member, modules, settings, roles) for member in members)), None)


def keep_reason(
    name: str, modules: Mapping[str, nn.Module], settings: QuantizationSettings, roles: ModelRoles
) -> str | None:
    """Why the module ``name`` stays in float; ``None`` if it is to be quantized."""
    module = modules[name]
    if any(pattern.matches(name) for pattern in settings.skip_modules):
        return "skip_modules"
    if settings.overrides_bits(name) == 16:
        return "overrides: quantization_bits=16"
    if isinstance(module, nn.Embedding) and name not in roles.embeddings:
        return "not an input embedding"
    target = packed_class(module)
    if target is None:
        return _unsupported_reason(module)
    if any(pattern.matches(name) for pattern in roles.float32):
        return "the model lists it in _keep_in_fp32_modules"
    if name in roles.weight_readers and settings.overrides_bits(name) is None:
        return f"{roles.weight_readers[name]} reads this weight itself"
    if (name in roles.embeddings or name in roles.heads) and _embedding_bits(name, settings) == 16:
        return "embedding_bits=16"
    return _shape_reason(module, target, settings)


def _unsupported_reason(module: nn.Module) -> str:
    if _computes_its_weight(module):
        return "its weight is computed from other parameters (pruning, weight norm)"
    if has_expert_weights(module):
        return f"{type(module).__name__} computes its experts in a way that is not known here"
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of Linear whose owner may read its weight"
    return f"{type(module).__name__} is not a kind of layer that is quantized"


def _shape_reason(module: nn.Module, target: type[PackedModule], settings: QuantizationSettings) -> str | None:
    weights = module.float_weights if isinstance(module, PackedModule) else target.weights_of(module)
    narrow = make_layer_scheme(4, "weight_only", None, True).weight
    if all(is_supported(weight, narrow) for weight in weights.values()):
        return None
    return "shape: too small to pack"


def _embedding_bits(name: str, settings: QuantizationSettings) -> int:
    return settings.overrides_bits(name) or settings.embedding_bits


def _scheme_for(
    name: str,
    modules: Mapping[str, nn.Module],
    settings: QuantizationSettings,
    roles: ModelRoles,
    model_parameters: int,
) -> LayerScheme:
    module = modules[name]
    target = packed_class(module)
    assert target is not None
    weights = target.weights_of(module)
    own = settings.for_module(name)
    inputs = {weight.in_features for weight in weights.values()}
    if name in roles.embeddings or name in roles.heads:
        # A table is looked up or multiplied once per token: its activations stay in float.
        bits = _embedding_bits(name, settings)
        asked = own.group_size if bits == own.bits == 4 else None
        return _fit(bits, "weight_only", asked, own.symmetric, inputs, model_parameters)
    scheme = _fit(
        own.bits,
        own.quantization_type,
        own.group_size,
        own.symmetric,
        inputs,
        model_parameters,
        own.activation_symmetric,
    )
    return replace(scheme, residual=own.keep_residual)


def _fit(
    bits: int,
    quantization_type: str,
    group_size: int | None,
    symmetric: bool,
    inputs: set[int],
    model_parameters: int,
    activation_symmetric: bool = True,
) -> LayerScheme:
    """The scheme for weights whose rows have the lengths ``inputs``; one that is a single group is per channel."""
    common = gcd(*inputs)  # a group size divides it if and only if it divides them all
    if group_size is None:
        group_size = -1 if bits == 8 else automatic_group_size(common, model_parameters) or -1
    elif group_size != -1 and common % group_size:
        given = " and ".join(map(str, sorted(inputs)))
        raise SchemeError(f"in_features={given}, group_size={group_size}; use {fitting_group_sizes(common)}")
    size = None if group_size == -1 or inputs == {group_size} else group_size
    return make_layer_scheme(bits, quantization_type, size, symmetric, activation_symmetric)  # type: ignore[arg-type]


def tied_groups(modules: Mapping[str, nn.Module], roles: ModelRoles) -> dict[str, tuple[str, ...]]:
    """Module name -> all modules that share its weight, the one that owns it first; only for shared ones."""
    groups: dict[str, list[str]] = {}
    for target, source in _tied_parameters(modules, roles):
        target_module, _, parameter = target.rpartition(".")
        source_module = source.rpartition(".")[0]
        if parameter == "weight" and target_module in modules and source_module in modules:
            group = groups.setdefault(source_module, [source_module])
            if target_module not in group:
                group.append(target_module)
                groups[target_module] = group
    return {name: tuple(group) for name, group in groups.items()}


def _tied_parameters(modules: Mapping[str, nn.Module], roles: ModelRoles) -> Iterator[tuple[str, str]]:
    yield from roles.ties.items()
    owners: dict[int, str] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owner = owners.setdefault(id(weight), name)
            if owner != name:
                yield f"{name}.weight", f"{owner}.weight"


def unmatched_patterns(patterns: Iterable[ModulePattern], model: nn.Module) -> list[str]:
    """The patterns that match no module of ``model``; probably misspelt."""
    names = [name for name, _ in model.named_modules()]
    return [pattern.text for pattern in patterns if not any(pattern.matches(name) for name in names)]

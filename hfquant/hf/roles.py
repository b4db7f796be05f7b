"""What a Transformers model says about itself: embeddings, heads, ties, and what it keeps in float32."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hfquant.nn.packed_module import companion_name
from hfquant.nn.select import ModelRoles
from hfquant.nn.weight_readers import read_by_owner
from hfquant.schemes import ModulePattern


TASK_HEADS = ("classifier", "score", "qa_outputs")
"""What Transformers calls the heads of classifiers: they are new for every task, and train whole."""


TABLES = ("get_input_embeddings", "get_per_layer_input_embeddings")
"""Methods that answer with tables of tokens; the latter is the larger one in Gemma 3n and small Gemma 4."""


def model_roles(model: nn.Module) -> ModelRoles:
    """The roles of the modules of ``model``; in a plain module every ``nn.Embedding`` is an input embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(model, PreTrainedModel):
        embeddings = frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
        return ModelRoles(embeddings=embeddings, weight_readers=read_by_owner(model))
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    embeddings = frozenset(
        names[id(m)] for part in parts for ask in TABLES for m in _asked(part, ask) if id(m) in names
    )
    heads = frozenset(names[id(m)] for part in parts for m in _asked(part, "get_output_embeddings") if id(m) in names)
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    embeddings |= _tied_tables(model, ties, embeddings | heads)
    return ModelRoles(
        embeddings=embeddings,
        heads=heads,
        ties=ties,
        float32=tuple(_float32_patterns(parts)),
        weight_readers=_weight_readers(model),
    )


def _weight_readers(model: PreTrainedModel) -> dict[str, str]:
    """As ``read_by_owner``, but without reads that this model's config rules out."""
    found = read_by_owner(model)
    # Only then: some models of several texts (MusicGen) cannot say which config is the text's.
    spared = {owner for owner in NOT_REACHED.keys() & found.values() if NOT_REACHED[owner](model.config)}
    return {name: owner for name, owner in found.items() if owner not in spared}


def _adds_slices_up(config: Any) -> bool:
    return bool(getattr(config, "slow_but_exact", True) and getattr(config, "pretraining_tp", 2) > 1)


def _has_tables_of_layers(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "hidden_size_per_layer_input", True))


NOT_REACHED: dict[str, Callable[[Any], bool]] = {
    # Reads its table only to find out ids that it was not given, which raises where the table is packed.
    "Gemma4TextModel": lambda config: True,
    "Gemma4Model": lambda config: not _has_tables_of_layers(config),
    "BloomAttention": lambda config: not _adds_slices_up(config),
    "BloomMLP": lambda config: not _adds_slices_up(config),
}
"""Owner of a weight -> whether its code that reads the weight cannot run, with the model's config."""


def _tied_tables(model: PreTrainedModel, ties: Mapping[str, str], known: frozenset[str]) -> set[str]:
    """The ``nn.Embedding`` modules that share a weight with those in ``known``, over any number of ties.

    An encoder's copy of the table, say, or a shared one that no accessor names.
    """
    pairs = [(target.rpartition(".")[0], source.rpartition(".")[0]) for target, source in ties.items()]
    reached = set(known)
    for _ in pairs:
        reached |= {other for pair in pairs if reached & set(pair) for other in pair}
    return {name for name in reached - known if isinstance(model.get_submodule(name), nn.Embedding)}


def _asked(part: PreTrainedModel, method: str) -> Iterator[nn.Module]:
    """What ``part`` answers, if it does; models without such a module raise or return ``None``."""
    try:
        module = getattr(part, method)()
    except (NotImplementedError, AttributeError):
        return
    if isinstance(module, nn.Module):
        yield module


def _float32_patterns(parts: list[PreTrainedModel]) -> Iterator[ModulePattern]:
    for part in parts:
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for name in getattr(part, attribute, None) or ():
                yield ModulePattern(name)


def tie_companions(model: PreTrainedModel, ties: dict[str, str]) -> None:
    """Tell Transformers that modules which share a packed weight share its scales too.

    Args:
        model: Model whose ``all_tied_weights_keys`` gains the companions.
        ties: Module name -> module that owns the packed parameters.
    """
    for name, owner in ties.items():
        for suffix in ("scale", "zero_point"):
            key = companion_name("weight", suffix)
            if model.get_submodule(name)._parameters.get(key) is not None:
                model.all_tied_weights_keys[f"{name}.{key}"] = f"{owner}.{key}"


def untie_companions(model: PreTrainedModel) -> None:
    """Undo ``tie_companions``."""
    suffixes = tuple(companion_name("weight", suffix) for suffix in ("scale", "zero_point"))
    for key in [key for key in model.all_tied_weights_keys if key.endswith(suffixes)]:
        del model.all_tied_weights_keys[key]

"""Checking a quantized checkpoint against the model that Transformers is about to fill."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfquant.errors import ConfigError, FormatError
from hfquant.formats.headers import StoredTensor, read_headers
from hfquant.formats.native import check_format_version
from hfquant.formats.validate import (
    check_save_id,
    check_shard_names,
    check_tensors,
    check_values,
    expected_tensors,
)
from hfquant.hf.config import HfQuantConfig
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.select import packed_class
from hfquant.schemes import LayerScheme


def read_modules(config: HfQuantConfig, model: PreTrainedModel) -> dict[str, LayerScheme]:
    """The quantized modules that the config lists, by their names in ``model``.

    Raises:
        FormatError: If the list is missing, holds an unknown scheme, or does not fit the model.
    """
    check_format_version(config.format_version, config.hfquant_version)
    modules = config.modules
    if not isinstance(modules, Mapping) or not modules:
        raise FormatError(
            f"quantization_config.modules={modules!r}: expected module name -> scheme; config.json is damaged"
        )
    known, found = dict(model.named_modules()), {}
    for name, text in modules.items():
        try:
            scheme = LayerScheme.parse(text)
        except ConfigError as error:
            raise FormatError(f"quantization_config.modules[{name!r}]: {error}") from error
        own = model_name(name, known, model.base_model_prefix)
        if own is None:
            if is_saved_class(model):
                raise FormatError(f"quantization_config.modules lists {name!r}, which this model does not have")
            continue
        _check_fits(own, known[own], scheme)
        found[own] = scheme
    if not found:
        raise FormatError(
            f"none of the {len(modules)} quantized modules of the checkpoint is in {type(model).__name__}"
        )
    return found


def _check_fits(name: str, module: Any, scheme: LayerScheme) -> None:
    target = packed_class(module)
    if target is None or isinstance(module, PackedModule):
        raise FormatError(
            f"quantization_config.modules lists {name!r}, a {type(module).__name__}, which has no packed form"
        )
    for key, weight in target.weights_of(module).items():
        size = scheme.weight.group_size
        if size is not None and weight.in_features % size:
            raise FormatError(
                f"quantization_config.modules[{name!r}]={str(scheme)!r}: the group does not divide the "
                f"{weight.in_features} inputs of {key}"
            )


def is_saved_class(model: PreTrainedModel) -> bool:
    """Whether the checkpoint was saved from the very class that is being loaded."""
    return type(model).__name__ in (model.config.architectures or ())


def model_name(name: str, known: Mapping[str, Any], prefix: str) -> str | None:
    """The name in ``known`` that a checkpoint means by ``name``: with or without the base model's prefix."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in known:
            return candidate
    return None


def check_checkpoint(model: PreTrainedModel, files: Iterable[str], config: HfQuantConfig) -> None:
    """Check all files of a checkpoint against ``model``, whose packed modules are in place on the meta device.

    A model of the class that was saved needs every tensor and takes no other. Another class (a base model, a new head)
    needs every tensor of its quantized modules; its other parameters are Transformers' business.

    Raises:
        FormatError: Naming the file or tensor, what was expected and what was found.
    """
    paths = [Path(file) for file in files]
    name_or_path = Path(model.config.name_or_path or "")
    check_shard_names(paths, name_or_path if name_or_path.is_dir() else None)
    headers = read_headers(paths)
    check_save_id(headers.values(), config.save_id)
    expected = expected_tensors(model)
    found: dict[str, StoredTensor] = {}
    stored_names: dict[str, str] = {}
    for header in headers.values():
        for name, stored in header.tensors.items():
            own = model_name(name, expected, model.base_model_prefix) or name
            found[own], stored_names[own] = stored, name
    same_class = is_saved_class(model)
    required = _required_tensors(model, expected, everything=same_class)
    check_tensors(found, expected, required=required, allow_extra=not same_class)
    check_values(found, expected, stored_names)


def _required_tensors(model: PreTrainedModel, expected: Mapping[str, Any], *, everything: bool) -> list[str]:
    tied = set(model.all_tied_weights_keys)
    packed = {
        f"{name}.{key}" for name, m in model.named_modules() if isinstance(m, PackedModule) for key in m._parameters
    } - {f"{name}.bias" for name, _ in model.named_modules()}
    if not everything:
        return [name for name in expected if name in packed and name not in tied]
    return [name for name in expected if name in packed or not _is_made_anew(model, name) if name not in tied]


def _is_made_anew(model: PreTrainedModel, name: str) -> bool:
    """Whether the model says that ``name`` is not saved, or may be missing: fixed position tables, say."""
    if name in (model._keys_to_ignore_on_save or ()):
        return True
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())

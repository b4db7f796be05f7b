"""Saving and loading plain ``nn.Module`` models in the native format, without Transformers' model classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfquant.errors import ConfigError, FormatError
from hfquant.finetune.merge import merged_state_dict
from hfquant.formats.headers import read_headers
from hfquant.formats.native import SAVE_ID_KEY, check_format_version, content_metadata
from hfquant.formats.staging import staged_folder
from hfquant.formats.validate import check_save_id, check_tensors, check_values, expected_tensors
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.fuse import fuse_model_
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.select import packed_class
from hfquant.nn.swap import keep_packed_from_ddp_, packed_modules, swap_modules_
from hfquant.schemes import LayerScheme


WEIGHTS = "model.safetensors"

Model = TypeVar("Model", bound=nn.Module)


def save_quantized(model: nn.Module, save_directory: str | Path) -> None:
    """Save a plain module that ``quantize_model_ptq`` quantized; ``load_quantized`` reads it.

    Writes ``config.json`` and ``model.safetensors`` (``formats/native.py``) into a new folder beside ``save_directory``
    and renames it, so that an interrupted save leaves nothing half written.

    Raises:
        ConfigError: If the model was not quantized by hfquant.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, HfQuantQuantizer) or next(packed_modules(model), None) is None:
        raise ConfigError("the model is not quantized by hfquant; call quantize_model_ptq(model, ...) first")
    tensors = _unique_tensors(model)
    if quantizer.finetuning is not None:
        quantizer.quantization_config.finetuning = quantizer.finetuning.summary(model)
    metadata = content_metadata(tensors)
    config = quantizer.quantization_config
    config.save_id = metadata[SAVE_ID_KEY]
    with staged_folder(Path(save_directory)) as folder:
        text = json.dumps({"quantization_config": config.to_dict()}, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **metadata})


def load_quantized(model: Model, save_directory: str | Path) -> Model:
    """Fill a plain module from a checkpoint that ``save_quantized`` wrote, in place.

    Args:
        model: Float module of the same architecture; its weights do not matter (it may be on the meta device).
        save_directory: Folder of the checkpoint.

    Returns:
        ``model``, quantized.

    Raises:
        FormatError: If the checkpoint is damaged, incomplete, torn, or of another model.
    """
    folder = Path(save_directory)
    config = _read_config(folder / "config.json")
    schemes = _read_schemes(config, dict(model.named_modules()))
    ties = _ties(model, schemes)
    swap_modules_(model, schemes, ties)
    file = folder / WEIGHTS
    headers = read_headers([file])
    check_save_id(headers.values(), config.save_id)
    expected, found = expected_tensors(model), headers[file].tensors
    duplicates = _duplicate_names(model)
    check_tensors(found, expected, required=[name for name in expected if name not in duplicates])
    check_values(found, expected, {name: name for name in found})
    tensors = load_file(file)
    tensors |= {name: tensors[owner] for name, owner in duplicates.items() if name not in tensors}
    model.load_state_dict(tensors, assign=True)
    _tie(model, duplicates)
    model.hf_quantizer = HfQuantQuantizer(config, pre_quantized=True)
    keep_packed_from_ddp_(model)
    fuse_model_(model)
    return model


def _read_config(file: Path) -> HfQuantConfig:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file.name}: no quantization_config could be read ({error!r})") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file.name}: quantization_config={content!r}: expected an object")
    config = HfQuantConfig(**content)
    check_format_version(config.format_version, config.hfquant_version)
    return config


def _read_schemes(config: HfQuantConfig, modules: Mapping[str, nn.Module]) -> dict[str, LayerScheme]:
    if not isinstance(config.modules, Mapping) or not config.modules:
        raise FormatError(
            f"quantization_config.modules={config.modules!r}: expected a mapping of module name to scheme"
        )
    schemes = {}
    for name, text in config.modules.items():
        try:
            schemes[name] = LayerScheme.parse(text)
        except ConfigError as error:
            raise FormatError(f"quantization_config.modules[{name!r}]: {error}") from error
        if name not in modules or packed_class(modules[name]) is None or isinstance(modules[name], PackedModule):
            raise FormatError(
                f"quantization_config.modules lists {name!r}, which this model does not have as a float layer"
            )
    return schemes


def _ties(model: nn.Module, schemes: Mapping[str, LayerScheme]) -> dict[str, str]:
    owners: dict[int, str] = {}
    ties = {}
    for name in schemes:
        weight = model.get_submodule(name)._parameters.get("weight")
        owner = owners.setdefault(id(weight), name)
        if weight is not None and owner != name:
            ties[name] = owner
    return ties


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    duplicates = _duplicate_names(model)
    return {name: t.contiguous() for name, t in merged_state_dict(model).items() if name not in duplicates}


def _tie(model: nn.Module, duplicates: Mapping[str, str]) -> None:
    """Let each name in ``duplicates`` be the very parameter that its earlier name is."""
    for name, owner in duplicates.items():
        module, _, key = name.rpartition(".")
        if key in model.get_submodule(module)._parameters:
            model.get_submodule(module)._parameters[key] = model.get_parameter(owner)


def _duplicate_names(model: nn.Module) -> dict[str, str]:
    """Name -> the earlier name of the very same tensor."""
    owners: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    pairs = {name: owners.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: owner for name, owner in pairs.items() if name != owner}

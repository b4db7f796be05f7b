"""A quantized model as a stream of tensors: from memory, or from the files of a checkpoint without loading it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hfquant.errors import ConfigError, FormatError
from hfquant.finetune.merge import merged_state_dict
from hfquant.formats.headers import read_headers
from hfquant.formats.shards import INDEX
from hfquant.formats.stored_weight import Kind, StoredWeight
from hfquant.hf.config import QUANT_METHOD, HfQuantConfig
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.hf.roles import model_roles
from hfquant.nn.packed_module import PackedModule, companion_name
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_experts import QuantExperts
from hfquant.numerics.packing import PackedWeight


@dataclass
class QuantizedSource:
    """A model quantized by hfquant, and how to read each of its tensors.

    Attributes:
        model: Its packed modules are in place; on the meta device if the tensors are in files.
        tensors: Name in the state dict -> reads the tensor; tied tensors stand once.
        folder: Where the checkpoint is, if it is one.
        files: Closes the files.
    """

    model: PreTrainedModel
    tensors: Mapping[str, Callable[[], Tensor]]
    folder: Path | None = None
    files: ExitStack = field(default_factory=ExitStack)

    @property
    def quantizer(self) -> HfQuantQuantizer:
        """What quantized the model."""
        quantizer: HfQuantQuantizer = self.model.hf_quantizer
        return quantizer

    @property
    def items(self) -> int:
        """How many ``stream`` yields."""
        packed = [module for module in self.model.modules() if isinstance(module, PackedModule)]
        companions = sum(len(set(module._parameters) & module.companions()) for module in packed)
        return max(0, len(self.tensors) - companions)

    def stream(self) -> Iterator[StoredWeight | tuple[str, Tensor]]:
        """Every quantized weight, and every other tensor with its name, one at a time."""
        roles, modules = model_roles(self.model), dict(self.model.named_modules())
        ties = self.quantizer.selection.ties
        tables = {*roles.heads, *ties, *ties.values()}
        for name, read in self.tensors.items():
            module_name, _, key = name.rpartition(".")
            module = modules.get(module_name)
            if not isinstance(module, PackedModule) or key not in {*module.float_weights, *module.companions()}:
                yield name, read()
            elif key in module.float_weights:
                yield self._weight(name, key, module, kind_of(module, is_table=module_name in tables))

    def _weight(self, name: str, key: str, module: PackedModule, kind: Kind) -> StoredWeight:
        prefix = name.removesuffix(key)

        def read(suffix: str) -> Tensor | None:
            found = self.tensors.get(prefix + companion_name(key, suffix))
            return None if found is None else found()

        scale = read("scale")
        assert scale is not None
        packed = PackedWeight(self.tensors[name](), scale, read("zero_point"))
        scheme = replace(module.scheme, residual=False)  # only fine-tuning needs it
        return StoredWeight(name, kind, scheme, module.float_weights[key], packed, read("input_scale"))


def kind_of(module: nn.Module, *, is_table: bool) -> Kind:
    """The kind of layer a packed module is; ``is_table`` for output heads and shared tables."""
    if isinstance(module, QuantExperts):
        return "experts"
    if isinstance(module, QuantEmbedding):
        return "embedding"
    return "head" if is_table else "linear"


def open_source(model: PreTrainedModel | str | Path, **hub: Any) -> QuantizedSource:
    """Open a quantized model: one in memory, a folder, or a name on the Hub.

    Args:
        model: Model quantized by hfquant, or where its checkpoint is.
        **hub: ``revision`` and ``token`` for a name on the Hub.

    Raises:
        ConfigError: If it is not a Transformers model quantized by hfquant.
        FormatError: If the checkpoint is damaged; its structure and values are checked.
    """
    if isinstance(model, (str, Path)):
        return _open_folder(local_folder(model, **hub))
    if not isinstance(model, PreTrainedModel) or not isinstance(getattr(model, "hf_quantizer", None), HfQuantQuantizer):
        raise ConfigError(f"{type(model).__name__} is no Transformers model quantized by hfquant; quantize it first")
    state_dict = remove_tied_weights_from_state_dict(merged_state_dict(model), model)
    tensors = {name: partial(lambda tensor: tensor, tensor) for name, tensor in state_dict.items()}
    return QuantizedSource(model, tensors)


def local_folder(model: str | Path, **hub: Any) -> Path:
    """The folder of a checkpoint, downloaded first if ``model`` is a name on the Hub.

    Raises:
        ConfigError: If there is no such folder and no such name.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no config.json in this folder")
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or len(path.parts) > 2 or path.exists():
        raise ConfigError(f"{model}: no such folder")
    return Path(snapshot_download(str(model), **hub))


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, as its index names them.

    Raises:
        FormatError: If there is none, or the index is damaged.
    """
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{INDEX}: not a safetensors index ({error!r}); the file is damaged") from error
        wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if wrong:
            raise FormatError(f"{INDEX}: shard name {wrong[0]!r} holds a path; shard names must be plain file names")
        return [folder / name for name in names]
    if not (folder / "model.safetensors").is_file():
        raise FormatError(f"{folder}: no model.safetensors and no {INDEX}; there are no weights to read")
    return [folder / "model.safetensors"]


def skeleton(folder: Path) -> PreTrainedModel:
    """The float model that the config of ``folder`` describes, on the meta device.

    Raises:
        ConfigError: If the config names no class of Transformers.
    """
    config = AutoConfig.from_pretrained(folder)
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    model_class: Any = getattr(transformers, names[0]) if names else AutoModel
    with torch.device("meta"):
        if model_class is AutoModel:
            model: PreTrainedModel = AutoModel.from_config(config, dtype=config.dtype or torch.float32)
        else:
            model = model_class._from_config(config, dtype=config.dtype or torch.float32)
    return model.eval()


def _open_folder(folder: Path) -> QuantizedSource:
    fields = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    method = fields.get("quant_method") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or method != QUANT_METHOD:
        found = f"its quant_method is {method!r}" if fields else "it is not quantized"
        raise ConfigError(f"{folder}: expected a model quantized by hfquant, but {found}")
    model, files = skeleton(folder), checkpoint_files(folder)
    quantizer = HfQuantQuantizer(HfQuantConfig(**fields), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model, checkpoint_files=[str(file) for file in files])
    model.hf_quantizer = quantizer
    stack = ExitStack()
    tensors: dict[str, Callable[[], Tensor]] = {}
    for file, header in read_headers(files).items():
        stored = stack.enter_context(safe_open(file, framework="pt"))
        tensors |= {name: partial(stored.get_tensor, name) for name in header.tensors}
    order = [name for name in model.state_dict() if name in tensors]
    return QuantizedSource(model, {name: tensors[name] for name in order}, folder, stack)

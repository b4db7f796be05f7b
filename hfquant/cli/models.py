"""Loading models by path or Hub name, and the files that travel with them."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hfquant.errors import ConfigError


WEIGHT_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "*.tflite", "*.mlmodel", "*.partial"),
)
"""Files that hold weights, in any format; everything else of a model folder goes along with the quantized model."""

WRITTEN_WITH_THE_MODEL = {"config.json", "generation_config.json", "README.md", ".gitattributes"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_class(model: str) -> type[PreTrainedModel]:
    """The class a checkpoint was saved from, by its config; ``AutoModel`` where it names none."""
    config = AutoConfig.from_pretrained(model)
    names = config.architectures or ()
    known: list[type[PreTrainedModel]] = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return known[0] if known else AutoModel


def load_model(model: str, *, dtype: str = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a model with the class it was saved from; ``dtype`` is a name, or ``"auto"`` for the checkpoint's own."""
    return model_class(model).from_pretrained(model, dtype=dtype if dtype == "auto" else parse_dtype(dtype), **kwargs)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``.

    Raises:
        ConfigError: If it is not float32, bfloat16 or float16.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def copy_companion_files(model: str, target: Path) -> None:
    """Copy tokenizer, processor and other small files of ``model`` (folder or Hub name) into ``target``."""
    source = Path(model)
    if not source.is_dir():
        source = Path(snapshot_download(model, ignore_patterns=list(WEIGHT_PATTERNS)))
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = any(file.match(pattern) for pattern in WEIGHT_PATTERNS)
        if file.is_dir() or hidden or weights or relative.as_posix() in WRITTEN_WITH_THE_MODEL:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / relative)


def folder_bytes(folder: Path) -> int:
    """Bytes of all weight files in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

"""Loading models by path or Hub name, and the files that travel with them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hfquant.cli.output import one_line
from hfquant.errors import ConfigError


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(model: str) -> Any:
    """The config of ``model`` (folder or Hub name).

    Raises:
        ConfigError: If there is no such model.
    """
    path = Path(model)
    if path.is_file():
        raise ConfigError(f"{model} is a file; give the folder of the model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{model}: no config.json in this folder")
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2):
        raise ConfigError(f"{model}: no such folder")
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ConfigError(f"{model}: no such folder, and not to be had from the Hub: {one_line(error)}") from error


def load_model(model: str, *, dtype: str = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a model with the class it was saved from; ``AutoModel`` where its config names none that exists.

    Args:
        model: Folder or Hub name.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
        **kwargs: For ``from_pretrained``.

    Raises:
        ConfigError: If there is no such model or dtype.
    """
    wanted = dtype if dtype == "auto" else parse_dtype(dtype)
    names = read_config(model).architectures or ()
    classes: list[Any] = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    loaded: PreTrainedModel = (classes or [AutoModel])[0].from_pretrained(model, dtype=wanted, **kwargs)
    return loaded.eval()


def load_language_model(model: str) -> PreTrainedModel:
    """Load a model that continues text.

    Raises:
        ConfigError: If it is another kind of model.
    """
    loaded = load_model(model)
    if not loaded.can_generate():
        raise ConfigError(f"{model} is a {type(loaded).__name__}; expected a language model that generates text")
    return loaded


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``.

    Raises:
        ConfigError: If it is not float32, bfloat16 or float16.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_output(output: Path, model: str, *, overwrite: bool) -> Path:
    """The absolute path of ``output``, if it may be written.

    Raises:
        ConfigError: If it is the model's own folder, or not empty and ``overwrite`` is not given.
    """
    output = output.resolve()
    if output == Path(model).resolve():
        raise ConfigError(f"{output} is the model itself; give another folder to save into")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output} is not empty; pass --overwrite to replace the checkpoint in it")
    return output


def folder_bytes(folder: Path) -> int:
    """Bytes of all weight files in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

"""Text for calibration and evaluation, and its tokens."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hfquant.cli.output import one_line
from hfquant.errors import CalibrationError, ConfigError


def default_text() -> str:
    """Text that every CPython carries: the help topics, in order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(file: Path) -> str:
    """The text in ``file``.

    Raises:
        CalibrationError: If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise CalibrationError(f"{file}: no text in it")
    return text


def load_tokenizer(model: str) -> Any:
    """The tokenizer of ``model`` (folder or Hub name).

    Raises:
        ConfigError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: its tokenizer cannot be loaded: {one_line(error)}") from error


def text_tokens(tokenizer: Any, text: str) -> Tensor:
    """Tokens of ``text`` as one sequence ``[T]``, int64."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def text_windows(tokenizer: Any, text: str, length: int) -> list[Tensor]:
    """Consecutive windows ``[1, length]`` of ``text``, int64; each with the special tokens that the model expects.

    Args:
        tokenizer: Of the model.
        text: Any length.
        length: Tokens in a window, special tokens included; the last window may be shorter.
    """
    if tokenizer.is_fast:
        windows = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        return [torch.tensor(window).unsqueeze(0) for window in windows]
    # Only fast tokenizers return the overflow in windows; the others get the special tokens of the whole text.
    return [window.unsqueeze(0) for window in text_tokens(tokenizer, text).split(length)]

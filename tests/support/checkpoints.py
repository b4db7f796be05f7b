"""Reading and rewriting checkpoints, so that tests can damage them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``config.json`` in place."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None], *, name: str = "model.safetensors") -> None:
    """Change the tensors of one file in place, keeping its metadata."""
    file = folder / name
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None], *, name: str = "model.safetensors") -> None:
    """Change the JSON header of one file in place; the data stays."""
    file = folder / name
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_bytes(folder: Path, change: Callable[[bytes], bytes], *, name: str = "model.safetensors") -> None:
    """Change the bytes of one file in place."""
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


def set_scale(tensors: dict[str, Tensor], name: str, value: float) -> None:
    """Put ``value`` into the first scale of the tensor ``name`` of bit patterns."""
    tensors[name].view(torch.bfloat16).view(-1)[0] = value

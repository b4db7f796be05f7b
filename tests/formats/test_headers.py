import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hfquant.errors import FormatError
from hfquant.formats.headers import read_header, read_headers
from tests.support.checkpoints import edit_bytes, edit_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int16), "empty": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"key": "value"})
    return tmp_path / "model.safetensors"


def test_a_whole_header_is_read(file: Path) -> None:
    header = read_header(file)
    found = {name: (t.dtype, t.shape) for name, t in header.tensors.items()}
    assert found == {"a": ("F32", (2, 3)), "b": ("I16", (4,)), "empty": ("F32", (0, 5))}
    assert header.metadata == {"key": "value"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"", "truncated"),
        (lambda b: b[:8], "truncated"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"x", "1 bytes behind"),
        (lambda b: struct.pack("<Q", 2**63) + b[8:], "truncated"),
        (lambda b: b[:8] + b"\xff" + b[9:], "not JSON"),
        (lambda b: struct.pack("<Q", 2) + b"[]" + b[10:], "not a JSON object"),
    ],
)
def test_damaged_files_are_refused(file: Path, change: Any, message: str) -> None:
    edit_bytes(file.parent, change)
    with pytest.raises(FormatError, match=f"model.safetensors: .*{message}"):
        read_header(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 23]},
        {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, -24]},
        {"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]},
        {"dtype": "X32", "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        {"dtype": "F32", "shape": [2, 3]},
        {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]},
        [],
        None,
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_refused(file: Path, entry: Any) -> None:
    edit_header(file.parent, lambda header: header.update(a=entry))
    with pytest.raises(FormatError, match=r"model.safetensors: .*\b(a|b)\b"):
        read_header(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("model.bin", "model.pt", "model.gguf"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(FormatError, match="safetensors files only"):
            read_header(tmp_path / name)
    with pytest.raises(FormatError, match="No such file"):
        read_header(tmp_path / "none.safetensors")


def test_a_tensor_in_two_files_is_refused(file: Path, tmp_path: Path) -> None:
    save_file({"b": torch.zeros(1)}, tmp_path / "second.safetensors")
    with pytest.raises(FormatError, match=r"b stands in both model.safetensors and second.safetensors"):
        read_headers([file, tmp_path / "second.safetensors"])


def test_metadata_must_be_an_object(file: Path) -> None:
    edit_header(file.parent, lambda header: header.update(__metadata__=json.dumps({})))
    with pytest.raises(FormatError, match="metadata"):
        read_header(file)

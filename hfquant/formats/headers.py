"""What stands in the headers of safetensors files, read without touching the tensors."""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfquant.errors import FormatError


MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its header describes it.

    Attributes:
        file: The file that holds it.
        dtype: Safetensors' name of the dtype: ``I32``, ``BF16``, ...
        shape: Sizes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The header of one file: its tensors and its metadata."""

    file: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        FormatError: If the file is missing, truncated, not safetensors, or describes tensors it cannot hold.
    """
    if file.suffix != ".safetensors":
        raise FormatError(f"{file.name}: quantized checkpoints are read from safetensors files only")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise FormatError(f"{file.name}: truncated: {size} bytes, the header alone takes {8 + length}")
            text = stream.read(length)
    except OSError as error:
        raise FormatError(f"{file.name}: cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{file.name}: the header is not JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file.name}: the header is not a JSON object; the file is damaged")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FormatError(f"{file.name}: the metadata in the header is not a JSON object; the file is damaged")
    tensors = {name: _stored_tensor(file, name, entry, size - 8 - length) for name, entry in content.items()}
    _check_layout(file, content, size - 8 - length)
    return Header(file, tensors, metadata)


def _stored_tensor(file: Path, name: str, entry: Any, data_bytes: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        count = DTYPE_BYTES[dtype]
        for dimension in shape:
            count *= dimension
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file.name}: the header entry of {name} is damaged: {entry!r}") from error
    if not whole or end - begin != count:
        raise FormatError(f"{file.name}: {name} is {dtype} {list(shape)}, which does not fit bytes {begin} to {end}")
    if end > data_bytes:
        raise FormatError(f"{file.name}: truncated: {name} ends at byte {end} of the data, the file holds {data_bytes}")
    return StoredTensor(file, dtype, shape)


def _check_layout(file: Path, content: dict[str, Any], data_bytes: int) -> None:
    """Tensors must follow each other without gap or overlap, up to the end of the file."""
    position = 0
    for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in content.items()):
        if begin != position:
            raise FormatError(f"{file.name}: {name} begins at byte {begin}, expected {position}; the header is damaged")
        position = end
    if position != data_bytes:
        raise FormatError(f"{file.name}: {data_bytes - position} bytes behind the last tensor; the file is damaged")


def read_headers(files: Iterable[Path]) -> dict[Path, Header]:
    """Headers of all files of one checkpoint.

    Raises:
        FormatError: As ``read_header``, or if a tensor stands in two files.
    """
    headers: dict[Path, Header] = {}
    owners: dict[str, Path] = {}
    for file in files:
        headers[file] = read_header(file)
        for name in headers[file].tensors:
            if name in owners:
                raise FormatError(f"{name} stands in both {owners[name].name} and {file.name}")
            owners[name] = file
    return headers


def canonicalize_header(file: Path) -> None:
    """Order the header of ``file`` by tensor name and metadata key, in place, so that equal content is equal bytes.

    Safetensors writes metadata in the random order of a hash map.

    Raises:
        FormatError: If the file is damaged.
    """
    header = read_header(file)
    with file.open("r+b") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        content = json.loads(stream.read(length))
        content["__metadata__"] = dict(sorted(header.metadata.items()))
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise FormatError(f"{file.name}: the header cannot be rewritten in place")
        stream.seek(8)
        stream.write(text.ljust(length))

"""Writing a checkpoint tensor by tensor, with no more than one shard in memory."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hfquant.errors import ConfigError


INDEX = "model.safetensors.index.json"

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Bytes of ``5GB``, ``300MiB`` or a number; ``name`` is the option's, for errors.

    Raises:
        ConfigError: If ``size`` is none of them.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).upper().strip())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{name}={size!r}: expected a size such as 5GB, 300MiB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2]])


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever ``max_bytes`` would be exceeded.

    Args:
        folder: Where the files go; ``model.safetensors``, or shards with an index.
        max_bytes: Of the tensors in one file; a larger tensor gets a file of its own.
        metadata: For the header of every file, beside ``format: pt``.
    """

    def __init__(self, folder: Path, max_bytes: int, metadata: Mapping[str, str] | None = None) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.metadata = {"format": "pt", **(metadata or {})}
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; the names must differ."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._flush()
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        self.shards.append(sorted(self.pending))
        save_file(self.pending, self.folder / f"shard-{len(self.shards)}.safetensors", metadata=self.metadata)
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the files their final names, and write the index if there are several."""
        if self.pending or not self.shards:
            self._flush()
        count = len(self.shards)
        names: dict[str, str] = {}
        for number, tensors in enumerate(self.shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            (self.folder / f"shard-{number}.safetensors").rename(self.folder / final)
            names |= dict.fromkeys(tensors, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(names.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def file_sha256(file: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()

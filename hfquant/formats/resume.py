"""What an interrupted run leaves behind, so that the same command goes on where it stopped.

A folder ``.<output>.resume`` beside the output, with ``run.json`` (a fingerprint of the run: settings, model files,
calibration data, versions) and one safetensors file for every part that is finished (a block, or a weight). A file
appears under its name only when it is whole. The folder of another run is emptied, never mixed in.

Integer tensors are handed back mapped from their file, so that finished parts take no memory of the process: the system
reads their pages when they are needed, and drops them when memory is short.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfquant.errors import FormatError


class ResumeFolder:
    """Finished parts of one run.

    Args:
        folder: Where they lie; made with the first part, removed first if it is of another run.
        fingerprint: Stands for everything the result depends on.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        file = folder / "run.json"
        found = file.read_text(encoding="utf-8") if file.is_file() else None
        if found != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)

    def load(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the record of a finished part; ``None`` if it is not finished."""
        file = self._file(part)
        return _read(file) if file.is_file() else None

    def save(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
        """Keep a finished part; returns its tensors as ``load`` does."""
        whole, partial = self._file(part), self._file(part).with_suffix(".partial")
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").write_text(self.fingerprint, encoding="utf-8")
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"record": json.dumps(record)})
        os.replace(partial, whole)
        found = _read(whole)
        if found is None:
            raise FormatError(f"{whole}: what was just written cannot be read; is the disk full?")
        return found[0]

    def remove(self) -> None:
        """The run is complete: nothing of this is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.folder / f"{hashlib.sha256(part.encode()).hexdigest()[:24]}.safetensors"


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        with safe_open(file, framework="pt") as stored:
            record = json.loads(stored.metadata()["record"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError):
        return None  # damaged from outside: it is made again
    # Torch's float kernels round differently on unaligned memory, and there are few floats.
    return {name: t.clone() if t.is_floating_point() else t for name, t in tensors.items()}, record


def run_fingerprint(settings: Mapping[str, Any], files: Iterable[Path]) -> str:
    """What tells one run from another: ``settings``, and name, size and time of the model's ``files``."""
    described = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    return json.dumps({"settings": settings, "files": described}, sort_keys=True, default=str)

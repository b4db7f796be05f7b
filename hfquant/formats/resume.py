"""What an interrupted run leaves behind, so that the same command goes on where it stopped.

A folder ``.<output>.resume`` beside the output, with ``run.json`` (a fingerprint of the run: settings, model files,
calibration data, versions) and one safetensors file for every part that is finished (a block, or a weight). A file
appears under its name only when it is whole. The folder of another run is emptied, never mixed in.
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
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                record = json.loads(stored.metadata()["record"])
                return {name: stored.get_tensor(name).clone() for name in stored.keys()}, record  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError):
            return None  # damaged from outside: it is made again

    def save(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished part."""
        whole, partial = self._file(part), self._file(part).with_suffix(".partial")
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            (self.folder / "run.json").write_text(self.fingerprint, encoding="utf-8")
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"record": json.dumps(record)})
        os.replace(partial, whole)

    def remove(self) -> None:
        """The run is complete: nothing of this is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.folder / f"{hashlib.sha256(part.encode()).hexdigest()[:24]}.safetensors"


def run_fingerprint(settings: Mapping[str, Any], files: Iterable[Path]) -> str:
    """What tells one run from another: ``settings``, and name, size and time of the model's ``files``."""
    described = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    return json.dumps({"settings": settings, "files": described}, sort_keys=True, default=str)

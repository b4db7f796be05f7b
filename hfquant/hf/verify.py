"""``verify_checkpoint``: is every byte of a checkpoint what was saved?"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm.auto import tqdm

from hfquant.errors import HfQuantError
from hfquant.formats.headers import Header, read_headers
from hfquant.formats.native import SAVE_ID_KEY, SHA256_KEY, tensor_sha256
from hfquant.formats.shards import file_sha256
from hfquant.hf.source import checkpoint_files, local_folder, open_source


EXPORT_RECORD = "hfquant_export.json"
"""File beside an export that holds the sha256 of every other file that computes."""


@dataclass(frozen=True)
class Verification:
    """What ``verify_checkpoint`` found.

    Attributes:
        folder: The checkpoint.
        files: Weight files that were read.
        tensors: Tensors in them.
        hashes: Tensors, or files of an export, whose sha256 was compared.
        problems: What is wrong and where; empty if nothing is.
    """

    folder: str
    files: int
    tensors: int
    hashes: int
    problems: tuple[str, ...]


def verify_checkpoint(model: str | Path, *, progress: bool = True, **hub: Any) -> Verification:
    """Check a checkpoint of hfquant, or an export, from end to end: structure, values, and the sha256 of everything.

    Args:
        model: Folder, or name on the Hub.
        progress: Show a progress bar.
        **hub: ``revision`` and ``token`` for a name on the Hub.

    Returns:
        What was checked and every problem that was found.

    Raises:
        ConfigError: If there is no such checkpoint, or hfquant did not write it.
    """
    folder = local_folder(model, **hub)
    if (folder / EXPORT_RECORD).is_file():
        return _verify_export(folder)
    headers: dict[Path, Header] = {}
    problems: list[str] = []
    try:
        headers = read_headers(checkpoint_files(folder))
        if "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            open_source(folder).files.close()
    except (HfQuantError, ValueError) as error:
        problems.append(str(error))
    recorded = _recorded(headers.values(), problems)
    stored = {name: file for file, header in headers.items() for name in header.tensors}
    problems += [f"{name} is recorded with a sha256 and missing from the files" for name in recorded.keys() - stored]
    problems += [f"{name} in {stored[name].name} has no recorded sha256" for name in stored.keys() - recorded.keys()]
    compared = sorted(recorded.keys() & stored.keys(), key=lambda name: (stored[name], name))
    for name in tqdm(compared, desc="Verifying", unit="tensor", disable=not progress):
        with safe_open(stored[name], framework="pt") as tensors:
            found = tensor_sha256(tensors.get_tensor(name))
        if found != recorded[name]:
            problems.append(f"{name} in {stored[name].name}: sha256 {found[:12]}..., recorded {recorded[name][:12]}...")
    return Verification(str(folder), len(headers), len(stored), len(compared), tuple(problems))


def _recorded(headers: Any, problems: list[str]) -> dict[str, str]:
    """Tensor name -> sha256, as the first file has it; all files of a save must agree."""
    records = {header.file.name: header.metadata.get(SHA256_KEY) for header in headers}
    ids = {header.metadata.get(SAVE_ID_KEY) for header in headers}
    if len(ids) > 1 or len(set(records.values())) > 1:
        problems.append(f"files of different saves are mixed: {', '.join(sorted(records))}")
    text = next((record for record in records.values() if record), None)
    if text is None:
        problems.append("no sha256 was recorded: the model was not in memory when it was saved (offloaded or sharded)")
        return {}
    try:
        return {str(name): str(digest) for name, digest in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        problems.append(f"the recorded sha256 list is damaged: {error}")
        return {}


def _verify_export(folder: Path) -> Verification:
    recorded: dict[str, str] = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))["sha256"]
    problems = list(_changed_files(folder, recorded))
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    problems += [f"{file.name} is of another export" for file in weights if file.name not in recorded]
    return Verification(str(folder), len(weights), 0, len(recorded), tuple(problems))


def _changed_files(folder: Path, recorded: dict[str, str]) -> Iterator[str]:
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif (found := file_sha256(folder / name)) != digest:
            yield f"{name}: sha256 {found[:12]}..., recorded {digest[:12]}..."

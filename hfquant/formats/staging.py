"""Writing a folder as a whole: into a temporary sibling, which then takes the place of the old one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfquant.errors import FormatError


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends without an error.

    An existing ``target`` is replaced as a whole; until then it stays as it was. What an interrupted run leaves behind
    is a folder called ``.<name>.<random>.partial``, never a half-written ``target``.

    Raises:
        FormatError: If ``target`` exists and is not a folder, or holds files that are no checkpoint.
    """
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target} is a file; give a folder to save into")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise FormatError(f"{target} holds files and no config.json; give an empty folder or one with a checkpoint")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        if target.is_dir():
            old = staging.with_suffix(".old")
            target.rename(old)
            staging.rename(target)
            shutil.rmtree(old)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

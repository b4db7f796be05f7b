"""Runs the Triton kernels on the CPU, in Triton's interpreter; each file in a process of its own.

The interpreter is chosen when a kernel is imported, and other tests in this process compile the same kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="Triton is optional, and has no wheel for this platform")

FOLDER = Path(__file__).with_name("interpreted")
CHECKS = sorted(FOLDER.glob("check_*.py"))


def test_there_are_checks() -> None:
    assert len(CHECKS) >= 2


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--timeout=240",
        str(path),
    ]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout

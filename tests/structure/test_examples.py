"""Every example runs, at smoke size."""

import importlib.util
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
RUNNABLE = sorted(path for path in EXAMPLES.glob("*.py") if "def main(smoke" in path.read_text())


def test_there_are_examples() -> None:
    assert len(RUNNABLE) >= 6


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_example_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(path)])
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(smoke=True)  # examples assert what they claim
    assert "Traceback" not in capsys.readouterr().err

"""A run that is killed goes on where it stopped, and ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfquant.formats.resume import ResumeFolder, run_fingerprint


RunJson = Callable[..., Any]
INT4 = ("--bits", 4, "--group-size", 32)


class KilledError(BaseException):
    """Stands for a kill that no handler sees."""


def killed_after(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run die once so many parts are finished."""
    save, done = ResumeFolder.save, []

    def dying(self: ResumeFolder, *arguments: Any) -> Any:
        if len(done) == parts:
            raise KilledError
        done.append(1)
        return save(self, *arguments)

    monkeypatch.setattr(ResumeFolder, "save", dying)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["data-free", "gptq", "signround"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    kind: str, float_model: Path, text_file: Path, tmp_path: Path, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*INT4, *(() if kind == "data-free" else ("--calibration", text_file, "--algorithm", kind))]
    words += ["--iterations", 2] if kind == "signround" else []
    whole = run_json("quantize", float_model, "-o", tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        killed_after(1, patch)
        with pytest.raises(KilledError):
            run_json("quantize", float_model, "-o", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.resume").glob("*.safetensors"))) == 1
    loaded: list[str] = []
    load = ResumeFolder.load

    def watching(self: ResumeFolder, part: str) -> Any:
        found = load(self, part)
        loaded.extend([part] if found else [])
        return found

    monkeypatch.setattr(ResumeFolder, "load", watching)
    again = run_json("quantize", float_model, "-o", tmp_path / "out", *words)
    assert len(loaded) == 1
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    assert again["bits_per_quantized_weight"] == whole["bits_per_quantized_weight"]


def test_another_command_starts_anew(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"1")
    first = ResumeFolder(tmp_path / "r", run_fingerprint({"bits": 4}, [model]))
    first.save("part", {"x": torch.ones(2)}, {"a": 1})
    same = ResumeFolder(tmp_path / "r", run_fingerprint({"bits": 4}, [model]))
    assert same.load("part")[1] == {"a": 1}
    (file,) = (tmp_path / "r").glob("*.safetensors")
    file.write_bytes(b"damaged")
    assert same.load("part") is None
    same.save("part", {"x": torch.ones(2)}, {"a": 1})
    model.write_bytes(b"22")
    assert ResumeFolder(tmp_path / "r", run_fingerprint({"bits": 4}, [model])).load("part") is None
    assert ResumeFolder(tmp_path / "r", run_fingerprint({"bits": 8}, [model])).load("part") is None


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kill_dash_nine_at_random_moments(float_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Twenty kills, at moments spread over a whole run; the output may be whole before a late kill."""
    words = [*map(str, INT4), "--calibration", str(text_file), "--algorithm", "signround", "--iterations", "300"]
    program = "from hfquant.cli.main import main; main()"
    command = [sys.executable, "-c", program, "quantize", str(float_model), *words, "--json", "-o"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - started
    expected = weights(tmp_path / "whole")
    generator = torch.Generator().manual_seed(0)
    killed = 0
    while killed < 20:
        out = tmp_path / f"out{killed}"
        for _ in range(2):  # two kills in a row, then to the end
            process = subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            time.sleep(seconds * float(torch.rand(1, generator=generator)))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        if not out.exists():
            done = subprocess.run([*command, str(out)], capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            json.loads(done.stdout)
        assert weights(out) == expected
    assert not [path for path in os.listdir(tmp_path) if path.endswith(".partial")]

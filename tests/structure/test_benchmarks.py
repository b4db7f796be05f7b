"""The benchmarks run, at smoke size."""

import importlib.util
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_quality_at_smoke_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("quality", BENCHMARKS / "quality.py")
    quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quality)
    rows = {row["scheme"]: row for row in quality.main(["--smoke"])["language"]}
    assert rows["INT4 g64 search, embeddings 4"]["smaller"] > rows["INT8 weight-only, embeddings 8"]["smaller"] > 2
    assert rows["INT8 weight-only, embeddings 16"]["mean_kl"] < rows["INT4 g64 absmax, embeddings 8"]["mean_kl"]
    assert "| float32 |" in capsys.readouterr().out


def test_kernels_at_smoke_size(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("kernels", BENCHMARKS / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    rows = kernels.main(["--smoke"])
    assert {row["op"] for row in rows} == set(kernels.CASES)
    assert "max error" in capsys.readouterr().out

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


def test_gpu_benchmark_up_to_the_first_call_to_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    for part in gpu.PARTS:
        assert gpu.main([part, "--dry-run", "--json", str(tmp_path / "out.json")]) == 0
        assert "no CUDA call was made" in capsys.readouterr().out
        assert gpu.main([part]) == 1  # refuses to measure without a GPU
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr(gpu, "LLAMA_1B", [(48, 64)])
    rows = gpu.value_parity("cpu") + gpu.linear_parity("cpu", [(48, 128)])  # the checks themselves, on the references
    assert len(rows) > 50
    assert all(row["ok"] for row in rows), [row["check"] for row in rows if not row["ok"]]
    assert gpu.table([{"N": 1, "us": 2.5}]) == "| N | us |\n| --- | --- |\n| 1 | 2.50 |"


def test_ptq_at_smoke_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("ptq", BENCHMARKS / "ptq.py")
    ptq = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ptq)
    rows = {row["method"]: row for row in ptq.main(["--smoke"])["rows"]}
    assert set(rows) == {"rtn", "search", "gptq", "signround"}
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert "| gptq |" in capsys.readouterr().out

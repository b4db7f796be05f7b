"""The benchmarks run, at smoke size."""

import importlib
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hfquant.nn.swap import packed_modules
from hfquant.numerics.packing import unpack


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_engine_benchmarks_measure_what_they_say() -> None:
    """The engines have environments of their own; what runs here is what the figures are made of."""
    serve = load("serve_vllm")
    logits = torch.randn(1, 3, 300)
    answers = [[dict(enumerate(row.log_softmax(-1).tolist()[:100])) for row in logits[0]]]
    assert abs(serve.mean_kl(logits.log_softmax(-1), answers)) < 1e-6
    assert serve.mean_kl(torch.randn(1, 3, 300).log_softmax(-1), answers) > 0.1
    texts = load("run_llama_cpp").strings(1000)
    assert len(texts) == 1000
    assert len(set(texts)) > 950
    assert load("run_gptqmodel").CASES


def test_quality_at_smoke_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quality = load("quality")
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


def test_kernels_at_smoke_size(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("cpu_kernels", BENCHMARKS / "cpu_kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    rows = kernels.main(["--smoke"])
    assert {row["op"] for row in rows} == set(kernels.CASES)
    assert "max error" in capsys.readouterr().out


def test_runs_are_kept_and_failures_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    results = importlib.import_module("arms").results
    calls = {"a": (dict, ([("x", 1)],)), "b": (dict, ([("x", 2)],))}
    found = results(tmp_path, calls, jobs=2, reuse=True)
    assert [result["x"] for result in found] == [1, 2]
    assert all(result["computed_on"] for result in found)
    (tmp_path / "a.json").write_text('{"x": 5}')
    assert results(tmp_path, calls) == [{"x": 5}, found[1]]
    with pytest.raises(RuntimeError, match="failed: c"):
        results(tmp_path, {"c": (dict, (3,)), "d": (dict, ())})
    assert (tmp_path / "d.json").is_file()


def test_models_at_smoke_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    models, given = load("cpu_models"), ["--smoke", "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    (part,) = models.main(given)["parts"].values()
    rows = {(row["arm"], row["task"]): row for row in part["rows"]}
    assert {arm for arm, _ in rows} == {"float32", "W8A8 static"}
    assert all(row["ms"] > 0 for row in rows.values())
    assert rows["float32", "prefill"]["times_float32"] == 1
    monkeypatch.setattr(models, "started", None)  # a finished part is not measured again
    assert models.main(given)["parts"].values()


def test_qat_at_smoke_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("qat", BENCHMARKS / "qat.py")
    qat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(qat)
    results = qat.main(["--smoke", "--threads", "1"])
    assert all(results[arm] > 0 for arm in ("zero-step", "ptq-gptq", "qat-full", "qat-lora", "qat-scales-gptq"))
    assert all(found["peak_bytes"] > 0 for found in results["cost"].values())


def test_fewer_levels_are_codes_of_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    qat, scheme = importlib.import_module("qat"), {"quantization_type": "dynamic", "group_size": -1}
    torch.manual_seed(0)
    ids, scheme = torch.arange(60).view(2, 30), {"quantization_bits": 4, "embedding_bits": 16, **scheme}
    model = qat.prepared(qat.tiny_llama(), "qat-full-2bit", scheme)
    qat.train(model, 2, 1e-2, (model(ids).logits.square().mean() for _ in range(2)))
    codes = {name: module.codes() for name, module in qat.fake_quant_modules(model)}
    assert {int(code) for values in codes.values() for code in values.unique()} == {-2, -1, 0, 1}
    with torch.no_grad():
        trained = model.eval()(ids).logits
        shipped = qat.converted(model, "qat-full-2bit", scheme, None, None)
        assert torch.equal(shipped(ids).logits, trained)
    for name, module in packed_modules(shipped):
        assert torch.equal(unpack(module.packed().weight, bits=4, length=codes[name].shape[-1]), codes[name])


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
def test_finetune_at_smoke_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    finetune = load("finetune")
    tables = finetune.main(["--smoke"])
    for task, measure in (("language", "perplexity"), ("classification", "accuracy")):
        rows = {row["arm"]: row for row in tables[task]["rows"]}
        for arm in ("nf4", "side", "grid", "grid-delay", "scales"):
            assert rows[arm][measure] > 0
            assert rows[f"{arm}, merged"][measure] > 0
        assert rows["grid"][measure] == pytest.approx(rows["grid, merged"][measure], rel=1e-5)
        assert {"lora", "lora, ptq", "lora-signround, ptq"} <= rows.keys()
    assert {row["arm"] for row in tables["classification"]["paired"]} == {
        f"{a}, merged" for a in ("grid", "grid-delay", "scales", "side")
    }


@pytest.mark.parametrize("arm", ["lora", "nf4", "scales", "grid", "grid-delay"])
def test_finetune_keeps_what_it_has_trained(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    finetune = load("finetune")
    given = ["language", "--steps", "3", "--batch", "2", "--context", "16", "--results", str(tmp_path)]
    options, rate = finetune.arguments(given), (1e-2, 1e-2)
    task = finetune.SmokeLanguage(options)
    logits, inputs = [], task.parts["test"][:16].unsqueeze(0)
    for _ in range(2):
        model, seconds = finetune.trained(task, options, arm, 0, rate)
        monkeypatch.setattr("qat.train", None)  # the second time is from the file
        with torch.no_grad():
            logits.append(model(inputs).logits)
        assert seconds > 0
    assert torch.equal(*logits)
    with torch.no_grad():
        untrained = finetune.prepared(finetune.base_model(task, options, arm, 0), arm, 0).eval()(inputs).logits
    assert not torch.equal(logits[0], untrained)


def test_losses_go_on_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    finetune = load("finetune")
    for name, kind in finetune.SMOKE.items():
        options = finetune.arguments([name, "--batch", "4", "--context", "16"])
        task = kind(options)
        model = task.float_model(0).eval()
        with torch.no_grad():
            whole = list(itertools.islice(task.losses(model, seed=0), 5))
            assert torch.equal(torch.stack(list(itertools.islice(task.losses(model, 0, 3), 2))), torch.stack(whole[3:]))
        assert len({float(loss) for loss in whole}) > 1


def test_paired_bootstrap() -> None:
    finetune = load("finetune")
    right = ["1110" * 50, "1100" * 50]
    same = finetune.paired_bootstrap(right, right, draws=100)
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
    worse = finetune.paired_bootstrap(["1000" * 50, "1100" * 50], right, draws=1000)
    assert worse["difference"] == -25
    assert -36 < worse["low"] < -25 < worse["high"] < -14


def test_ptq_at_smoke_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("ptq", BENCHMARKS / "ptq.py")
    ptq = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ptq)
    rows = {row["method"]: row for row in ptq.main(["--smoke"])["rows"]}
    assert set(rows) == {"rtn", "search", "awq", "gptq", "signround"}
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert "| gptq |" in capsys.readouterr().out


def test_allocation_at_smoke_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = load("allocate").main(["--smoke"])["language"]
    assert all(4.3 < row["bits"] <= 4.5 for row in rows)
    assert rows[0]["schemes"] == "14 x int4-g32"
    assert len({row["schemes"] for row in rows}) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_at_smoke_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    (row,) = load("memory").main(["tiny"])["rows"]
    assert row["finished"]
    assert 0 < row["peak RssAnon GB"] < row["peak VmRSS GB"]
    assert row["planned bytes"] == row["bytes"]


def test_no_script_hides_a_package() -> None:
    """A script's folder comes first on the path, and Transformers imports ``kernels`` if there is one."""
    names = {path.stem for path in [*BENCHMARKS.glob("*.py"), *(BENCHMARKS.parent / "examples").glob("*.py")]}
    assert not names & {"kernels", "torch", "transformers", "datasets", "peft", "trl", "evaluate", "accelerate"}

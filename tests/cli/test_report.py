"""hfquant plan and hfquant report."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from hfquant.hf.hub import model_card


Run = Callable[..., Result]
RunJson = Callable[..., Any]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def calibrated(float_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, run_json: RunJson) -> Path:
    out = tmp_path_factory.mktemp("report") / "int4"
    words = ("--bits", 4, "--calibration", text_file, "--evaluate", text_file, "--evaluate-tokens", 200)
    summary = run_json("quantize", float_model, "-o", out, *words)
    assert summary["algorithm"] == "gptq"
    return out


def test_the_report_is_stored_and_complete(calibrated: Path, run_json: RunJson) -> None:
    report = run_json("report", calibrated)
    assert report == json.loads((calibrated / "quality_report.json").read_text())
    assert report["quality"]["tokens"] == sum(report["quality"]["kl_counts"]) == 199
    assert report["quality"]["perplexity"] != report["quality"]["reference_perplexity"]
    assert 0 < report["quality"]["top1_agreement"] <= 1
    assert len(report["calibration"]["sha256"]) == 64
    assert report["seconds"] > 0
    assert report["peak_memory"] > 0
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["model.layers.0.mlp.down_proj.weight"]["method"] in ("gptq", "weighted")
    assert layers["model.layers.0.mlp.down_proj.weight"]["bits_per_weight"] == 4.25
    assert layers["model.embed_tokens.weight"]["method"] == "search"
    assert report["kept"]["model.norm.weight"] == "norm"


def test_the_page_is_whole_and_self_contained(calibrated: Path, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "report.html"
    assert run("report", calibrated, "--html", page).exit_code == 0
    text = page.read_text()
    assert not re.search(r"(src|href)=|@import|url\(", text)
    for part in ("Error by layer", "Bits by layer", "How far each prediction moved", "down_proj", "<svg"):
        assert part in text
    bars = text.partition("Error by layer")[2].partition("</svg>")[0]
    assert "mlp.down_proj" in bars
    assert "embed_tokens" not in bars  # no calibration token is measured on a table
    assert "mean KL" in run("report", calibrated, "--markdown").stdout


def test_the_model_card_shows_the_report(calibrated: Path) -> None:
    text = model_card(calibrated, repo_id="tester/q").text
    assert "## How it was quantized" in text
    assert re.search(r"^\| perplexity \| [\d.]+ → [\d.]+ \([+-][\d.]+ %\) \|$", text, flags=re.MULTILINE)
    assert re.search(r"^\| calibrated on \| \d+ tokens, sha256 [0-9a-f]{16}… \|$", text, flags=re.MULTILINE)


def test_bits_by_budget_and_static_shares_are_reported(
    float_model: Path, text_file: Path, tmp_path: Path, run_json: RunJson, run: Run
) -> None:
    words = ("--target-bits", 4.6, "--calibration", text_file, "--calibration-batches", 4, "--algorithm", "search")
    run_json("quantize", float_model, "-o", tmp_path / "budget", *words)
    report = run_json("report", tmp_path / "budget")
    assert report["allocation"]["kind"] == "kl"
    assert 4.2 < report["allocation"]["bits"] <= 4.6
    assert report["activations"]["weight_only"] == 1
    assert "bits by budget" in run("report", tmp_path / "budget").stdout
    assert len({layer["bits_per_weight"] for layer in report["layers"]}) > 1
    size = run_json("plan", float_model, "--target-bits", 4.6)["bits_per_weight"]
    assert 4.6 < size < 8  # with the tables in 8 bits
    words = ("--bits", 8, "--type", "static", "--calibration", text_file, "--calibration-batches", 4)
    run_json("quantize", float_model, "-o", tmp_path / "static", *words)
    shares = run_json("report", tmp_path / "static")["activations"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["static"] > 0.5
    assert "% static" in run("report", tmp_path / "static").stdout


def test_names_are_escaped(calibrated: Path, tmp_path: Path, run: Run) -> None:
    report = json.loads((calibrated / "quality_report.json").read_text())
    report["model"] = "<script>alert(1)</script>"
    (tmp_path / "quality_report.json").write_text(json.dumps(report))
    run("report", tmp_path, "--html", tmp_path / "r.html")
    assert "<script" not in (tmp_path / "r.html").read_text()


def test_without_a_report(float_model: Path, tmp_path: Path, refused: Refused) -> None:
    assert "no quality report" in refused("report", float_model)
    (tmp_path / "quality_report.json").write_text("[]")
    assert "not a quality report" in refused("report", tmp_path)


def test_plan_as_text_and_json(float_model: Path, run: Run, run_json: RunJson) -> None:
    words = ("--bits", 4, "--calibrated", "--calibration-batches", 4)
    plan = run_json("plan", float_model, *words)
    assert plan["algorithm"] == "gptq"
    assert plan["bytes_after"] < plan["bytes_before"]
    assert "kept: " in run("plan", float_model, *words).stdout or plan["kept"] == {}
    result = run("plan", float_model, "--bits", 4, "--group-size", 48)
    assert result.exit_code == 1
    assert "does not divide the input of these layers" in result.stderr

"""The command as a whole: verbs, exit codes, errors, and what goes to which stream."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hfquant.cli.main import VERBS, app
from hfquant.errors import ConfigError


Run = Callable[..., Result]
Refused = Callable[..., str]


def console(*words: object) -> subprocess.CompletedProcess[str]:
    """The console entry in a new process, with progress bars."""
    environment = {
        key: value for key, value in os.environ.items() if not key.endswith(("TQDM_DISABLE", "PROGRESS_BARS"))
    }
    command = [sys.executable, "-c", "from hfquant.cli.main import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_console_entry_keeps_stdout_for_the_result(float_model: Path, tmp_path: Path) -> None:
    done = console("quantize", float_model, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits"] == 8
    assert "Loading weights: 100%" in done.stderr


def test_console_entry_reports_errors_in_one_line(tmp_path: Path) -> None:
    done = console("info", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"hfquant: ConfigError: {tmp_path / 'nothing'}: no such folder\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_debug(verb: str, run: Run) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


def test_help_lists_the_verbs(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["quantize"],
        ["quantize", "model"],
        ["quantize", "model", "-o", "out", "--bits", "four"],
        ["evaluate", "model", "--tokens", "1"],
        ["info", "model", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(words: list[str], run: Run) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(tmp_path / "nothing"), "--debug"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError)


def test_models_that_are_none(float_model: Path, tmp_path: Path, refused: Refused) -> None:
    assert "no such folder" in refused("info", tmp_path / "nothing")
    assert "no such folder" in refused("info", "./nothing")
    assert "no config.json" in refused("info", tmp_path)
    assert "give the folder" in refused("info", float_model / "config.json")
    assert "not to be had from the Hub" in refused("info", "nobody/nothing")


def test_damaged_files_are_named(quantized_model: Path, float_model: Path, tmp_path: Path, refused: Refused) -> None:
    for model in (quantized_model, float_model):
        damaged = tmp_path / model.name
        shutil.copytree(model, damaged)
        weights = (damaged / "model.safetensors").read_bytes()
        (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        assert refused("info", damaged)
    assert "model.safetensors" in refused("info", tmp_path / quantized_model.name)


def test_unknown_architecture(float_model: Path, tmp_path: Path, refused: Refused) -> None:
    config = json.loads((float_model / "config.json").read_text()) | {"model_type": "unheard-of"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "unheard-of" in refused("info", tmp_path)

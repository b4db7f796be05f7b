"""Loading checkpoints in new processes, with or without hfquant, and comparing what they compute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.support.tiny_models import TINY, generated, output


ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfquant":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
"""First lines of a program for which hfquant is not installed."""

COMPARE = """
import json, sys, torch
assert "hfquant" not in sys.modules
import transformers
from safetensors.torch import load_file
from tests.support.tiny_models import TINY, generated, output
torch.set_num_threads(1)
failures = []
for folder, name, class_name in json.loads(sys.argv[1]):
    model = getattr(transformers, class_name).from_pretrained(folder)
    expected = load_file(folder + "/expected.st")
    if not torch.equal(output(model, name), expected["output"]):
        failures.append([folder, "output"])
    if "tokens" in expected and not torch.equal(generated(model, name), expected["tokens"]):
        failures.append([folder, "tokens"])
print(json.dumps(failures))
"""
"""Loads each checkpoint, and prints those that compute something else than the process that saved them."""


def run_python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a new process that can import the tests' support modules."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=variables, check=False
    )


def save_with_expectation(model: PreTrainedModel, name: str, folder: Path, **options: Any) -> list[str]:
    """Save ``model`` and what it computes; returns what ``COMPARE`` needs to check it."""
    model.save_pretrained(folder, **options)
    expected = {"output": output(model, name)}
    if TINY[name].generates:
        expected["tokens"] = generated(model, name)
    save_file(expected, folder / "expected.st")
    return [str(folder), name, type(model).__name__]


def compare_in_new_process(saved: list[list[str]], *, prefix: str = "", **environment: str) -> list[list[str]]:
    """What ``COMPARE`` printed for ``saved``; ``prefix`` are lines to run first."""
    done = run_python(prefix + COMPARE, json.dumps(saved), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    failures: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return failures

"""Training that is killed at any moment resumes, and ends where the run that was not killed ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfquant.training.staged_checkpoints import STAGING
from tests.support.processes import ROOT
from tests.training.test_finetune_trainer import PROGRAM, digests


STEPS, KILLS, WHILE_SAVING = 150, 10, 4


def start(folder: Path, adapter: str, mode: str) -> subprocess.Popen[bytes]:
    fields = {"adapter": adapter, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HFQUANT_KERNELS": "reference"}
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(fields), mode]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def kill(run: subprocess.Popen[bytes], folder: Path, *, saving: bool, chance: random.Random) -> bool:
    """Kill ``run`` after its first checkpoint, while it saves or at any moment; whether a save was under way."""
    before = checkpoints(folder)
    while run.poll() is None and checkpoints(folder) <= before:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.5))
    while saving and run.poll() is None and not (folder / STAGING).exists():
        pass
    time.sleep(chance.uniform(0, 0.02) if saving else 0)
    assert run.poll() is None, "it ended before it was killed; give it more steps"
    run.send_signal(signal.SIGKILL)
    run.wait()
    return (folder / STAGING).exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adapter", ["grid", "scales", "side"])
def test_ten_kills_change_nothing(adapter: str, tmp_path: Path) -> None:
    if adapter == "side":
        pytest.importorskip("hfquant.hf.peft")
    whole, killed, chance = tmp_path / "whole", tmp_path / "killed", random.Random(5)
    assert start(whole, adapter, "start").wait() == 0
    while_saving = 0
    for number in range(KILLS):
        run = start(killed, adapter, "resume" if number else "start")
        while_saving += kill(run, killed, saving=number < 2 * WHILE_SAVING, chance=chance)
    assert while_saving >= WHILE_SAVING - 1
    assert start(killed, adapter, "resume").wait() == 0
    last = f"checkpoint-{STEPS}"
    assert digests(killed / last) == digests(whole / last)
    assert checkpoints(killed) == checkpoints(whole)

"""A long benchmark as many small runs: in other processes, several at a time, each result in a file."""

import json
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch


Call = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]


def results(
    folder: Path, calls: dict[str, Call], *, jobs: int = 1, threads: int = 1, reuse: bool = False
) -> list[dict[str, Any]]:
    """The results of ``calls`` in their order: from ``folder/NAME.json``, or from another process that writes it.

    Args:
        folder: Where results stay: the command can be interrupted and given again.
        calls: Function and arguments of each run by its name; the function must be importable by its name.
        jobs: How many run at a time.
        threads: Of torch, in each.
        reuse: Let a process do one run after another: what a GPU needs to start takes longer than a short run.

    Raises:
        RuntimeError: If a run failed; the others have ended and are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: call for name, call in calls.items() if not (folder / f"{name}.json").is_file()}
    if missing:
        settings = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": None if reuse else 1}
        with ProcessPoolExecutor(min(jobs, len(missing)), **settings) as pool:
            running = {pool.submit(_kept, folder, name, threads, call): name for name, call in missing.items()}
            _wait(running)
    return [json.loads((folder / f"{name}.json").read_text()) for name in calls]


def _wait(running: dict[Future, str]) -> None:
    failed = {}
    for done, future in enumerate(as_completed(running), 1):
        name, error = running[future], future.exception()
        print(f"[{done}/{len(running)}] {name}" + (f" failed: {error!r}" if error else ""), flush=True)
        if error is not None:
            failed[name] = error
    if failed:
        raise RuntimeError(f"these runs failed: {', '.join(failed)}") from next(iter(failed.values()))


def _kept(folder: Path, name: str, threads: int, call: Call) -> None:
    torch.set_num_threads(threads)
    function, arguments = call
    found = function(*arguments)
    found |= {"computed_on": torch.cuda.get_device_name() if torch.cuda.is_initialized() else platform.machine()}
    unfinished = folder / f"{name}.json.{os.getpid()}"
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    unfinished.replace(folder / f"{name}.json")

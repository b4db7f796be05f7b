"""A long benchmark as many small runs: each in a process of its own, several at a time, its result in a file."""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch


PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"]
"""Imported once, in the process that all runs are forked from."""
# That process must not touch a GPU, or its children could not; looking for one through NVML does not.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

Call = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]


def results(folder: Path, calls: dict[str, Call], *, jobs: int = 1, threads: int = 1) -> list[dict[str, Any]]:
    """The results of ``calls`` in their order: from ``folder/NAME.json``, or from a new process that writes it.

    Args:
        folder: Where results stay: the command can be interrupted and given again.
        calls: Function and arguments of each run by its name; the function must be importable by its name.
        jobs: How many run at a time.
        threads: Of torch, in each.

    Raises:
        RuntimeError: If a run failed; the others have ended and are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: call for name, call in calls.items() if not (folder / f"{name}.json").is_file()}
    if missing:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context, max_tasks_per_child=1) as pool:
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
    unfinished = folder / f"{name}.json.{os.getpid()}"
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    unfinished.replace(folder / f"{name}.json")

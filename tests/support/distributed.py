"""The same training in one process and in two that talk over gloo, and examples under launchers."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.processes import ROOT, run_python


STEPS, ROWS = 5, 4


def connect(rank: int, world: int, folder: str) -> None:
    """Join the other processes, if there are any."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)


def train_steps(
    model: nn.Module,
    layers: Iterable[nn.Module],
    rank: int,
    world: int,
    *,
    sharded: bool,
    unused: bool = False,
    before_step: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> Tensor:
    """Losses of a few steps of SGD, each over all processes' shares of a batch; FSDP2 if ``sharded``, else DDP."""
    wrapped = model
    if world > 1 and sharded:
        mesh = init_device_mesh("cpu", (world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif world > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
    batches = torch.randint(3, 128, (STEPS, ROWS, 8), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step, batch in enumerate(batches[:, rank::world]):
        before_step(step, optimizer)
        logits = wrapped(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total / world)
    return torch.stack(losses)


def run_ranks(worker: str, folder: Path, world: int) -> list[dict[str, Tensor]]:
    """What each of ``world`` processes of the program ``worker`` saved as ``<world>-<rank>.safetensors``."""
    with ThreadPoolExecutor(world) as pool:
        runs = [pool.submit(run_python, worker, str(rank), str(world), str(folder)) for rank in range(world)]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr[-3000:]
    return [load_file(folder / f"{world}-{rank}.safetensors") for rank in range(world)]


def run_launched(launch: str, words: str) -> str:
    """What an example printed under a launcher; on the reference kernels, whose results are equal to the last bit."""
    done = subprocess.run(
        [sys.executable, *launch.split(), *words.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=os.environ | {"HFQUANT_KERNELS": "reference", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

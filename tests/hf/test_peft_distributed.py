"""Two gloo processes train an adapter beside packed layers as one does, replicated (DDP) and sharded (FSDP2)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.processes import run_python


WORKER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from safetensors.torch import save_file
torch.set_num_threads(1)
from tests.support.adapters import lora, quantized
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
found = {}
for scheme in ("int4", "int8-static"):
    for sharded in (False, True):
        batches = torch.randint(3, 128, (5, 4, 8), generator=torch.Generator().manual_seed(1))
        model = quantized("llama-tied", scheme, embedding_bits=8)
        model = lora(model if sharded else model.double(), target_modules=["q_proj", "down_proj"])
        model = model if sharded else model.double()
        wrapped = model
        if world > 1 and sharded:
            mesh = init_device_mesh("cpu", (world,))
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif world > 1:
            wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for batch in batches[:, rank::world]:
            logits = wrapped(input_ids=batch).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            if world > 1:
                dist.all_reduce(total)
            losses.append(total / world)
        kind = f"{scheme}-{'fsdp' if sharded else 'ddp'}"
        found[f"{kind}.losses"] = torch.stack(losses)
        if not sharded:
            found |= {f"{kind}.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        elif world > 1:
            assert type(model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight).__name__ == "DTensor"
save_file(found, f"{folder}/{world}-{rank}.safetensors")
"""


def run_ranks(folder: Path, world: int) -> list[dict[str, torch.Tensor]]:
    with ThreadPoolExecutor(world) as pool:
        runs = [pool.submit(run_python, WORKER, str(rank), str(world), str(folder)) for rank in range(world)]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr[-3000:]
    return [load_file(folder / f"{world}-{rank}.safetensors") for rank in range(world)]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    (one,), (first, second) = run_ranks(tmp_path, 1), run_ranks(tmp_path, 2)
    assert sum("lora_" in name for name in one) == 16
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        if "-fsdp." in name:
            torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=0, msg=name)
        else:
            assert tensor.dtype == torch.float64, name
            assert float((first[name] - tensor).abs().max()) <= 1e-9, name

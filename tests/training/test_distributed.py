"""Two gloo processes train what one does."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.processes import run_python


WORKER = """
import json, os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from safetensors.torch import save_file
torch.set_num_threads(1)
from hfquant import prepare_model_qat
from hfquant.qat.prepare import fake_quant_modules
from tests.support.tiny_models import build
rank, world, folder, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
torch.manual_seed(1)
batches = torch.randint(3, 128, (5, 4, 8))
mine = batches[:, rank::world]
model = build("llama-tied").double()
data = [{"input_ids": batch} for batch in mine] if kind == "static" else None
prepare_model_qat(model, quantization_bits=4, quantization_type=kind, calibration_data=data, progress=False)
wrapped = DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for batch in mine:
    logits = wrapped(input_ids=batch).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
tensors = {"codes." + name: module.codes() for name, module in fake_quant_modules(model)}
tensors |= {name: p.detach().clone() for name, p in model.named_parameters()}
save_file(tensors, f"{folder}/{kind}-{world}-{rank}.safetensors")
"""


def run_ranks(folder: Path, kind: str, world: int) -> list[dict[str, torch.Tensor]]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(world) as pool:
        runs = [pool.submit(run_python, WORKER, str(rank), str(world), str(folder), kind) for rank in range(world)]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr[-3000:]
    return [load_file(folder / f"{kind}-{world}-{rank}.safetensors") for rank in range(world)]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    for kind in ("weight_only", "static"):
        (tmp_path / kind).mkdir()
        (one,) = run_ranks(tmp_path / kind, kind, 1)
        first, second = run_ranks(tmp_path / kind, kind, 2)
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name]), name
            if name.startswith("codes."):
                assert torch.equal(first[name], tensor), name
            elif tensor.is_floating_point():
                assert float((first[name].double() - tensor.double()).abs().max()) <= 1e-9, name

"""Two gloo processes fine-tune what one does, replicated (DDP) and sharded (FSDP2)."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import quantize_model_ptq
from tests.support.processes import ROOT, run_python


WORKER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from safetensors.torch import save_file
torch.set_num_threads(1)
from hfquant import prepare_model_for_finetuning, quantize_model_ptq
from hfquant.finetune.adapted import adapted_modules
from tests.support.finetune import packed_model
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
found = {}
RUNS = ("grid", "int4", "llama-tied"), ("scales", "int8-static", "llama-tied"), ("grid", "int4", "mixtral")
for adapter, scheme, name in RUNS:
    for sharded in (False, True):
        generator = torch.Generator().manual_seed(1)
        batches = torch.randint(3, 128, (5, 4, 8), generator=generator)
        model = packed_model(name, scheme)
        model = model if sharded else model.double()
        prepare_model_for_finetuning(model, adapter, rank=4, progress=False)
        wrapped = model
        if world > 1 and sharded:
            mesh = init_device_mesh("cpu", (world,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif world > 1:
            wrapped = DistributedDataParallel(model, find_unused_parameters=name == "mixtral")
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
        kind = f"{adapter}-{name}-{'fsdp' if sharded else 'ddp'}"
        found[f"{kind}.losses"] = torch.stack(losses)
        if not sharded:
            found |= {f"{kind}.codes.{n}.{k}": m.codes(k) for n, m in adapted_modules(model) for k in m.float_weights}
            found |= {f"{kind}.{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        elif world > 1:
            assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == "DTensor"
save_file(found, f"{folder}/{world}-{rank}.safetensors")
"""


def run_ranks(folder: Path, world: int) -> list[dict[str, torch.Tensor]]:
    with ThreadPoolExecutor(world) as pool:
        runs = [pool.submit(run_python, WORKER, str(rank), str(world), str(folder)) for rank in range(world)]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr[-3000:]
    return [load_file(folder / f"{world}-{rank}.safetensors") for rank in range(world)]


def test_two_processes_fine_tune_what_one_does(tmp_path: Path) -> None:
    (one,), (first, second) = run_ranks(tmp_path, 1), run_ranks(tmp_path, 2)
    assert sum(".codes." in name for name in one) > 20
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        if ".codes." in name:
            assert torch.equal(first[name], tensor), name
        elif "-fsdp." in name:
            assert torch.allclose(first[name], tensor, rtol=1e-5, atol=0), name
        else:
            assert tensor.dtype == torch.float64, name
            assert float((first[name] - tensor).abs().max()) <= 1e-9, name


def test_two_processes_of_the_trainer_write_one_checkpoint(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    quantize_model_ptq(LlamaForCausalLM(config), quantization_bits=4, progress=False).save_pretrained(tmp_path / "int4")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node 2 {ROOT}/examples/07_finetune_quantized.py"
    words = f"--model {tmp_path}/int4 --context 16 --output_dir {tmp_path}/out --use_cpu --ddp_backend gloo"
    words += " --adapter grid --adapter_rank 4 --max_steps 4 --save_steps 2 --learning_rate 1e-2 --report_to none"
    done = subprocess.run(
        [sys.executable, *launch.split(), *words.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        # the example compares with what was trained, bit for bit
        env=os.environ | {"HFQUANT_KERNELS": "reference", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same logits as in training: True") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", "checkpoint-4", "final"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "out/checkpoint-4").iterdir()}

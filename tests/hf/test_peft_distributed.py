"""Two gloo processes train an adapter beside packed layers as one does, replicated (DDP) and sharded (FSDP2)."""

from pathlib import Path

import torch

from tests.support.distributed import run_ranks


WORKER = """
import sys, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from tests.support.adapters import lora, quantized
from tests.support.distributed import connect, train_steps
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
connect(rank, world, folder)
found = {}
for scheme in ("int4", "int8-static"):
    for sharded in (False, True):
        model = quantized("llama-tied", scheme, embedding_bits=8)
        model = lora(model if sharded else model.double(), target_modules=["q_proj", "down_proj"])
        model = model if sharded else model.double()
        layers = model.base_model.model.model.layers
        kind = f"{scheme}-{'fsdp' if sharded else 'ddp'}"
        found[f"{kind}.losses"] = train_steps(model, layers, rank, world, sharded=sharded)
        if not sharded:
            found |= {f"{kind}.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        elif world > 1:
            assert type(layers[0].mlp.down_proj.base_layer.weight).__name__ == "DTensor"
save_file(found, f"{folder}/{world}-{rank}.safetensors")
"""


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    (one,), (first, second) = run_ranks(WORKER, tmp_path, 1), run_ranks(WORKER, tmp_path, 2)
    assert sum("lora_" in name for name in one) == 16
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        if "-fsdp." in name:
            torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=0, msg=name)
        else:
            assert tensor.dtype == torch.float64, name
            assert float((first[name] - tensor).abs().max()) <= 1e-9, name

"""Peak memory of fine-tuning, for each weight: how much more a process needs for a model twice as deep.

What one layer needs while it is computed, and what the process needs anyway, is in both and drops out.
"""

import json
import sys

import pytest

from tests.support.processes import run_python


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc"),
]

SIZE, RANK, LAYERS = 2048, 8, 12

WORKER = """
import json, sys, torch
from torch import nn
from hfquant import get_quantization_info, prepare_model_for_finetuning, quantize_model_ptq
torch.set_num_threads(1)
layers, adapter, bits, size, rank = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
options = {"quantization_bits": bits, "quantization_type": "weight_only", "group_size": 64, "algorithm": "rtn"}

def layer():
    return nn.Sequential(nn.Linear(size, size, bias=False))

model = nn.Sequential(*(quantize_model_ptq(layer(), progress=False, **options)[0] for _ in range(layers)))
model.hf_quantizer = quantize_model_ptq(layer(), progress=False, **options).hf_quantizer
prepare_model_for_finetuning(model, adapter, rank=rank, progress=False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False)
x = torch.randn(1, size)

def step():
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

for _ in range(2):
    step()
open("/proc/self/clear_refs", "w").write("5")
for _ in range(2):
    step()
found = get_quantization_info(model, optimizer).finetuning
gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
print(json.dumps({"peak": peak(), "codes": found.codes, "optimizer": found.optimizer_bytes, "gradients": gradients,
                  "learned": found.learned_scale_bytes + found.adapter_bytes, "weights": found.weight_bytes}))
"""


def more_for_twice_the_depth(adapter: str, bits: int) -> dict[str, float]:
    """Bytes for each further weight."""
    runs = []
    for layers in (LAYERS, 2 * LAYERS):
        # Freed memory goes back to the system at once.
        options = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = run_python(WORKER, *map(str, (layers, adapter, bits, SIZE, RANK)), **options)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    weights = runs[1]["codes"] - runs[0]["codes"]
    return {key: (runs[1][key] - runs[0][key]) / weights for key in runs[0]}


@pytest.mark.parametrize(("adapter", "bits", "limit"), [("grid", 4, 1.07), ("grid", 8, 1.57), ("scales", 4, 0.82)])
def test_peak_memory_for_each_weight(adapter: str, bits: int, limit: float) -> None:
    found = more_for_twice_the_depth(adapter, bits)
    listed = found["learned"] + found["optimizer"] + found["gradients"]
    measured = found["peak"] - (listed if adapter == "grid" else 0)
    assert found["weights"] <= limit
    assert measured <= limit, found

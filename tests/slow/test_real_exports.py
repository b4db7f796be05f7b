"""SmolLM2-135M as compressed-tensors, in plain Transformers where hfquant is not installed: hfquant's own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hfquant import export_model, quantize_model_ptq
from tests.slow.test_real_models import COMPARE, smollm2
from tests.support.fake_quant_reference import simulate_activations_
from tests.support.processes import BLOCKED, run_python


pytest.importorskip("compressed_tensors")

CT_DIVISOR = 127.5
"""compressed-tensors takes absmax / 127.5 for symmetric dynamic INT8."""

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16-g64": {"quantization_bits": 4, "group_size": 64},
    "w4a16-g32": {"quantization_bits": 4, "group_size": 32},
    "w8a16": {"quantization_bits": 8, "quantization_type": "weight_only"},
    "w8a8-dynamic": {"quantization_bits": 8},
    "w8a8-dynamic-symmetric": {"quantization_bits": 8, "activation_symmetric": True},
    "w8a8-static": {"quantization_bits": 8, "quantization_type": "static"},
    "w4a8-g32": {"quantization_bits": 4, "quantization_type": "dynamic", "group_size": 32},
    "mixed": {"quantization_bits": 4, "group_size": 64, "overrides": {"down_proj": {"quantization_bits": 8}}},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("reference_kernels")  # an engine that multiplies in float has their sums, bit for bit
@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_transformers_gives_the_same_logits(scheme: str, tmp_path: Path) -> None:
    model, ids = smollm2(torch.float32)
    data = {"calibration_data": [{"input_ids": ids}]} if scheme == "w8a8-static" else {}
    quantize_model_ptq(model, embedding_bits=16, progress=False, **SCHEMES[scheme], **data)
    export_model(model, "compressed-tensors", tmp_path, engine="transformers", progress=False)
    simulate_activations_(model, divisor=CT_DIVISOR)
    with torch.no_grad():
        output = model(input_ids=ids).logits
    save_file({"ids": ids, "output": output}, tmp_path / "expected.st")
    done = run_python(BLOCKED + COMPARE, str(tmp_path), type(model).__name__, HFQUANT_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True"]

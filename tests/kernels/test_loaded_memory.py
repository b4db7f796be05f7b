"""A loaded INT4 model takes no more memory than its file: nothing is unpacked or repacked on the side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import quantize_model_ptq
from hfquant.kernels import native
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.numerics.affine import scale_to_bits


MEASURE = """
import json, sys
import torch, transformers
import hfquant
from transformers import AutoModelForCausalLM

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
start = anonymous()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded = anonymous() - start
with torch.inference_mode():
    model.generate(torch.arange(10, 42)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
print(json.dumps({"loaded": loaded, "used": anonymous() - start}))
"""

ACTIVATIONS = 24_000_000
"""Bytes for code that is used for the first time, and for activations; the unpacked table alone would be 131 MB."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not native.is_active(), reason="no native kernels")
def test_a_loaded_model_takes_the_memory_of_its_file(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, tie_word_embeddings=True))
    quantize_model_ptq(model, progress=False, quantization_bits=4, group_size=32, embedding_bits=4)
    model.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] <= 1.15 * size, (found, size)
    assert found["used"] <= 1.15 * size + ACTIVATIONS, (found, size)
    assert torch.float32.itemsize * 64_000 * 512 > size + ACTIVATIONS  # a float copy of the table could not hide


def flags_at(address: int) -> list[str]:
    """What the system knows of the memory at ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(part, 16) for part in name.split("-"))
            inside = start <= address < end
        elif inside and name == "VmFlags:":
            return values
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(not native.is_active(), reason="no native kernels")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_results_ask_for_large_pages() -> None:
    pages, page = 40, 1 << 21  # more than malloc ever takes from memory that it has: 32 MiB
    weight = torch.zeros(page // 256, 16 * pages, dtype=torch.int32)
    scale = scale_to_bits(torch.ones(len(weight), 1))
    result = dequantize_weight(weight, scale, None, bits=8, in_features=64 * pages, dtype=torch.float32)
    assert result.nbytes == pages * page
    aligned = -(-result.data_ptr() // page) * page
    for inside in (0, pages - 2):
        assert "hg" in flags_at(aligned + inside * page)
    assert (result == -128).all()

"""Peak memory of quantizing while loading, on a Llama of 1.2 billion random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


MEASURE = """
import json, sys, threading
import torch, transformers
import hfquant
from hfquant import HfQuantConfig, get_quantization_info
from transformers import AutoModelForCausalLM

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

start, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=HfQuantConfig(quantization_bits=4))
done.set()
thread.join()
size = get_quantization_info(model).bytes_after
print(json.dumps({"peak": peak[0] - start, "after": anonymous() - start, "quantized": size}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_near_the_quantized_size(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    del model
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    largest_layer = 4 * config.vocab_size * config.hidden_size
    figures = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in (found | {"layer": largest_layer}).items())
    sys.stderr.write(figures + "\n")
    assert found["peak"] <= 1.3 * found["quantized"] + largest_layer, figures
    assert found["after"] <= 1.15 * found["quantized"], figures

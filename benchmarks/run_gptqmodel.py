"""Load hfquant's GPTQ exports of a tiny model with Transformers and GPTQModel on a CPU, and compare the logits.

python benchmarks/run_gptqmodel.py --python GPTQMODEL_PYTHON

GPTQMODEL_PYTHON is the interpreter of an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 optimum==2.3.0 accelerate requests setuptools ninja
    pip install --no-build-isolation gptqmodel==7.2.0
    pip install --no-deps torchvision==0.29.1

GPTQModel imports torchvision, whose wheel on PyPI is built for CUDA and does not load beside a CPU build of torch. None
of it is used here: its ops are only declared, so that it can be imported.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import export_model, quantize_model_ptq


CASES = {
    "int4-g32, v1": ({"quantization_bits": 4, "group_size": 32}, 1),
    "int4-g32, v2": ({"quantization_bits": 4, "group_size": 32}, 2),
    "int4-g32-asym, v2": ({"quantization_bits": 4, "group_size": 32, "symmetric": False}, 2),
    "int8-g32, v1": ({"quantization_bits": 8, "quantization_type": "weight_only", "group_size": 32}, 1),
}

WORKER = """
import importlib.util, pathlib, re, sys, torch
vision = pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
declared = torch.library.Library("torchvision", "DEF")
for name in set(re.findall(r'register_(?:meta\\(|fake\\("torchvision::)"?(\\w+)"', vision)):
    declared.define(name + "() -> ()")
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu").eval()
with torch.no_grad():
    logits = model(torch.arange(3, 67).unsqueeze(0)).logits.float()
save_file({"logits": logits.contiguous()}, sys.argv[2])
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    arguments = parser.parse_args()
    from safetensors.torch import load_file

    for name, (fields, version) in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
            )
            model = LlamaForCausalLM(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(3)
            quantize_model_ptq(model, embedding_bits=16, progress=False, **fields)
            model.save_pretrained(Path(work) / "native")
            half = LlamaForCausalLM.from_pretrained(Path(work) / "native", dtype=torch.bfloat16)
            export_model(model, "gptq", Path(work) / "x", gptq_version=version, progress=False)
            out = Path(work) / "logits.safetensors"
            done = subprocess.run(
                [arguments.python, "-c", WORKER, str(Path(work) / "x"), str(out)], capture_output=True, text=True
            )
            if done.returncode:
                print(json.dumps({"case": name, "failed": done.stderr.strip().splitlines()[-1]}), flush=True)
                continue
            with torch.no_grad():
                ids = torch.arange(3, 67).unsqueeze(0)
                own, noise = model(ids).logits, half(ids).logits.float()
            row = {
                "case": name,
                "layer": done.stdout.split()[-1],
                "max_logit": float(own.abs().max()),
                "max_difference": float((load_file(out)["logits"] - own).abs().max()),
                "hfquant_in_bfloat16": float((noise - own).abs().max()),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

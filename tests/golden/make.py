"""Rewrites the golden checkpoints: python -m tests.golden.make (seed 0; review the diff, add a CHANGELOG line).

Never do this to make a test pass: checkpoints that were written once must load for ever.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hfquant import quantize_model_ptq
from hfquant.numerics.packing import unpack
from tests.support.tiny_models import llama, text_inputs


HERE = Path(__file__).parent

GOLDEN: dict[str, dict[str, Any]] = {
    "int4-g16": {"quantization_bits": 4, "group_size": 16, "embedding_bits": 4},
    "int8-dynamic": {"quantization_bits": 8, "activation_symmetric": True},
    "int8-dynamic-asymmetric": {"quantization_bits": 8},
    "int4-asymmetric": {"quantization_bits": 4, "symmetric": False, "embedding_bits": 16},
}

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 8}


def main() -> None:
    for name, fields in GOLDEN.items():
        torch.manual_seed(0)
        model = quantize_model_ptq(llama(**SIZES).eval(), progress=False, **fields)
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE / name)
        linear = model.model.layers[0].mlp.down_proj
        codes = unpack(linear.weight, bits=linear.scheme.weight.bits, length=linear.in_features)
        with torch.no_grad():
            logits = model(**text_inputs()).logits
        save_file({"logits": logits, "codes": codes}, HERE / name / "expected.st")


if __name__ == "__main__":
    main()

"""Quantize a model to INT4 while it loads, save it, load it again: the same logits, bit for bit.

python examples/01_quantize_while_loading.py MODEL OUT
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfquant import HfQuantConfig, get_quantization_info


def quantize_and_reload(path: str, out: str) -> bool:
    config = HfQuantConfig(quantization_bits=4, quantization_type="weight_only")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    print(get_quantization_info(model))
    model.save_pretrained(out)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        return torch.equal(model(ids).logits, reloaded(ids).logits)


def tiny_model(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main(smoke: bool = False) -> None:
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            assert quantize_and_reload(tiny_model(Path(folder) / "float"), str(Path(folder) / "int4"))
        return
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print("equal after reloading:", quantize_and_reload(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()

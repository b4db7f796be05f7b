"""Quantize a model and write it for another engine; check that every byte is what was written.

python examples/05_export.py MODEL OUT [compressed-tensors|gptq|gguf|dense]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfquant import HfQuantConfig, export_model, verify_checkpoint


def quantize_and_export(path: str, out: Path, file_format: str) -> Path:
    config = HfQuantConfig(quantization_bits=4, group_size=32)
    AutoModelForCausalLM.from_pretrained(path, quantization_config=config).save_pretrained(out / "native")
    report = export_model(out / "native", file_format, out / file_format)
    print(f"{len(report.schemes)} layers in {sorted(set(report.schemes.values()))}, {report.file_bytes} bytes")
    for name, reason in report.dense.items():
        print(f"dense: {name}: {reason}")
    assert verify_checkpoint(out / file_format).problems == ()
    return out / file_format


def main(smoke: bool = False) -> None:
    if smoke:
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
        )
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(config).save_pretrained(Path(folder) / "float")
            for file_format in ("compressed-tensors", "gptq", "gguf", "dense"):
                quantize_and_export(str(Path(folder) / "float"), Path(folder), file_format)
        return
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    print("written to", quantize_and_export(sys.argv[1], Path(sys.argv[2]), (*sys.argv, "compressed-tensors")[3]))


if __name__ == "__main__":
    main()

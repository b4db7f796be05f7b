"""INT4 with GPTQ on a text: plan, quantize, and how each layer came about.

python examples/05_calibrated_int4.py MODEL TEXT_FILE OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfquant import HfQuantConfig, plan_quantization, quantize_model_ptq


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()


def main(smoke: bool = False) -> None:
    if smoke:
        model, data = tiny_model(), [torch.arange(start, start + 200) % 250 for start in range(8)]
    elif len(sys.argv) == 4:
        model, data = AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]
    else:
        sys.exit(__doc__)
    config = HfQuantConfig(quantization_bits=4, calibration_samples=4 if smoke else 128)
    print(plan_quantization(model, config, calibrated=True))
    quantize_model_ptq(model, config, calibration_data=data, progress=not smoke)
    results = model.hf_quantizer.results
    for result in sorted(results, key=lambda r: r.output_sqnr_db or 0)[:5]:
        print(f"{result.name}: {result.method}, {result.output_sqnr_db:.1f} dB at its output {result.note}")
    assert len(results) == sum(r.name.endswith("proj.weight") for r in results)
    if not smoke:
        model.save_pretrained(sys.argv[3])


if __name__ == "__main__":
    main()

"""INT4 for most layers, INT8 for those that suffer, float for one: overrides by module name.

python examples/03_mixed_precision.py MODEL OUT
"""

import sys

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfquant import HfQuantConfig, get_quantization_info, quantize_model_ptq


CONFIG = HfQuantConfig(
    quantization_bits=4,
    overrides={"mlp.down_proj": {"quantization_bits": 8}, "layers.0": {"quantization_bits": 16}},
)


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main(smoke: bool = False) -> None:
    if smoke:
        model = tiny_model()
    elif len(sys.argv) == 3:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    else:
        sys.exit(__doc__)
    info = get_quantization_info(quantize_model_ptq(model, CONFIG))
    print(info)
    assert {q.scheme for q in info.quantized if "down_proj" in q.name} == {"int8-channel"}
    assert not any("layers.0." in q.name for q in info.quantized)
    if not smoke:
        model.save_pretrained(sys.argv[2])


if __name__ == "__main__":
    main()

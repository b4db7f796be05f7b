"""INT8 weights and static INT8 activations for an encoder, calibrated on a few sentences.

python examples/02_static_int8_encoder.py MODEL OUT
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from hfquant import quantize_model_ptq


SENTENCES = [
    "A man is playing a guitar on the street.",
    "The stock market fell sharply on Monday.",
    "Two dogs run through the snow.",
    "The committee will meet again next week to decide.",
]


def tiny_encoder() -> tuple[BertModel, list[dict[str, torch.Tensor]]]:
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config).eval(), [{"input_ids": torch.arange(start, start + 12).unsqueeze(0)} for start in (1, 40)]


def main(smoke: bool = False) -> None:
    if smoke:
        model, batches = tiny_encoder()
    elif len(sys.argv) == 3:
        model, tokenizer = AutoModel.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
        batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in SENTENCES]
    else:
        sys.exit(__doc__)
    with torch.no_grad():
        before = model(**batches[0]).last_hidden_state
        quantize_model_ptq(model, quantization_bits=8, quantization_type="static", calibration_data=batches)
        after = model(**batches[0]).last_hidden_state
    print(f"relative error of the hidden states: {float((after - before).norm() / before.norm()):.4f}")
    if not smoke:
        model.save_pretrained(sys.argv[2])


if __name__ == "__main__":
    main()

"""Quantization-aware fine-tuning in TRL's SFTTrainer, with a callback: pip install trl

python examples/06_qat_sft.py MODEL OUT
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hfquant import HfQuantConfig, QatCallback, get_quantization_info


TEXTS = ["a cat sat on a mat", "a dog ate the cake", "the cat ate the mouse", "the mouse ran to the house"] * 8


def train(path: str, out: str, **options) -> None:
    config = HfQuantConfig(quantization_bits=4, quantization_type="weight_only")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=SFTConfig(output_dir=f"{out}-checkpoints", report_to="none", bf16=False, **options),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[QatCallback(config)],  # here, and not with add_callback: it prepares the model
    )
    trainer.train()
    trainer.save_model(out)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, trainer.model.eval().cpu()(ids).logits)
    print(get_quantization_info(reloaded))


def tiny_model(folder: Path) -> str:
    words = ["<pad>", "<unk>", "</s>", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main(smoke: bool = False) -> None:
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            options = {"use_cpu": True, "max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 2}
            train(tiny_model(Path(folder) / "float"), f"{folder}/int4", max_length=16, **options)
        return
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    train(sys.argv[1], sys.argv[2])


if __name__ == "__main__":
    main()

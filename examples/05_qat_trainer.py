"""Train a language model for INT4 with QuantTrainer; what is saved is what was trained, bit for bit.

python examples/05_qat_trainer.py --model MODEL --text FILE --output_dir OUT --quantization_mode qat \
    --quantization_bits 4 --quantization_type weight_only --max_steps 200 --learning_rate 3e-5 --distillation_weight 1

accelerate launch takes the same arguments after the name of this file. Every field of TrainingConfig is an option.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hfquant import QuantTrainer, TrainingConfig, get_quantization_info


@dataclass
class Data:
    model: str
    text: str | None = None
    context: int = 256


def windows(data: Data) -> list[dict[str, torch.Tensor]]:
    if data.text is None:  # without a text: random tokens, to try the script out
        ids = torch.randint(3, 250, (64 * data.context,), generator=torch.Generator().manual_seed(0))
    else:
        tokenizer = AutoTokenizer.from_pretrained(data.model)
        ids = tokenizer(Path(data.text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    parts = ids[: ids.numel() // data.context * data.context].split(data.context)
    return [{"input_ids": part, "labels": part} for part in parts]


def train(data: Data, config: TrainingConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(data.model, dtype=torch.float32)
    trainer = QuantTrainer(model=model, args=config, train_dataset=windows(data))
    trainer.train()
    final = Path(config.output_dir) / "final"
    trainer.save_model(str(final))
    if not trainer.is_world_process_zero():
        return
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        # Native kernels add up in another order; with HFQUANT_KERNELS=reference they are equal to the last bit.
        same = torch.allclose(reloaded(ids).logits, trainer.model.eval().cpu()(ids).logits, rtol=1e-4, atol=1e-4)
    info = get_quantization_info(reloaded)
    print(f"{final}: mode {info.quantization_mode}, INT{info.quantization_bits}; same logits as in training: {same}")
    assert same or config.bf16 or config.fp16  # under autocast the trained model is compared under autocast


def tiny_model(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main(smoke: bool = False) -> None:
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            words = f"--model {tiny_model(Path(folder) / 'float')} --context 16 --output_dir {folder}/out --use_cpu"
            words += " --quantization_mode qat --quantization_bits 4 --quantization_type weight_only --max_steps 3"
            words += " --distillation_weight 0.5 --save_strategy no --report_to none --learning_rate 1e-3"
            train(*HfArgumentParser((Data, TrainingConfig)).parse_args_into_dataclasses(words.split()))
        return
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    train(*HfArgumentParser((Data, TrainingConfig)).parse_args_into_dataclasses())


if __name__ == "__main__":
    main()

"""Fine-tune a quantized language model; its weights are packed all the time, and so is what is saved.

python examples/07_finetune_quantized.py --model QUANTIZED --text FILE --output_dir OUT --adapter grid \
    --adapter_rank 16 --learning_rate 1e-3 --max_steps 200

``--adapter grid`` moves codes and scales, ``scales`` only scales, norms and biases; ``side`` is LoRA through PEFT.
accelerate launch takes the same arguments after the name of this file. Every field of TrainingConfig is an option.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hfquant import QuantTrainer, TrainingConfig, get_quantization_info, merge_adapters, quantize_model_ptq


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
    config.enable_quantized_finetuning = True
    model = AutoModelForCausalLM.from_pretrained(data.model)
    trainer = QuantTrainer(model=model, args=config, train_dataset=windows(data))
    trainer.train()
    final = Path(config.output_dir) / "final"
    trainer.save_model(str(final))
    if not trainer.is_world_process_zero() or config.adapter == "side":
        return
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    ids = torch.arange(3, 19).unsqueeze(0)
    trained = trainer.model.eval().cpu()
    with torch.no_grad():
        # Native kernels add up in another order; with HFQUANT_KERNELS=reference they are equal to the last bit.
        same = torch.allclose(reloaded(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)
    print(f"{final}: {get_quantization_info(reloaded).finetuning}; same logits as in training: {same}")
    merged = merge_adapters(trained).state_dict()
    changed = [name for name, tensor in reloaded.state_dict().items() if not torch.equal(tensor, merged[name])]
    print(f"tensors that merging or saving changed: {len(changed)}")
    assert same or config.bf16 or config.fp16  # under autocast the trained model is compared under autocast
    assert not changed


def tiny_model(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    quantize_model_ptq(LlamaForCausalLM(config), quantization_bits=4, progress=False).save_pretrained(folder)
    return str(folder)


def main(smoke: bool = False) -> None:
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            words = f"--model {tiny_model(Path(folder) / 'int4')} --context 16 --output_dir {folder}/out --use_cpu"
            words += " --adapter grid --adapter_rank 4 --max_steps 3 --save_steps 2 --report_to none"
            words += " --learning_rate 1e-2 --disable_tqdm true"
            train(*HfArgumentParser((Data, TrainingConfig)).parse_args_into_dataclasses(words.split()))
        return
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    train(*HfArgumentParser((Data, TrainingConfig)).parse_args_into_dataclasses())


if __name__ == "__main__":
    main()

"""QLoRA on a packed model, with PEFT and Transformers' own Trainer: train, save, load, merge and take back.

python examples/07_peft_adapter.py MODEL OUT
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hfquant import quantize_model_ptq


def train(path: str, out: str, **options) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # keep_residual keeps four more bits a weight: with them, small updates survive the merge.
    quantize_model_ptq(model, quantization_bits=4, quantization_type="weight_only", keep_residual=True)
    model.save_pretrained(f"{out}/int4")

    model = AutoModelForCausalLM.from_pretrained(f"{out}/int4")
    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    args = TrainingArguments(output_dir=f"{out}/run", report_to="none", save_strategy="no", **options)
    trainer = Trainer(model=get_peft_model(model, config), args=args, train_dataset=windows())
    trainer.train()
    trainer.save_model(f"{out}/adapter")  # the adapter alone; the codes did not change

    adapted = AutoPeftModelForCausalLM.from_pretrained(f"{out}/adapter")
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        beside = adapted(ids).logits
        adapted.merge_adapter()  # rounds onto the grid, and logs what that cost
        adapted.unmerge_adapter()  # exact: the codes from before
        assert torch.equal(adapted(ids).logits, beside)
    merged = adapted.merge_and_unload()
    print(merged.merge_report)
    merged.save_pretrained(f"{out}/merged")  # INT4 again, as small as before
    again = AutoModelForCausalLM.from_pretrained(f"{out}/merged")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)


def windows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 250, (64, 32), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def main(smoke: bool = False) -> None:
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
            LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(Path(folder) / "float")
            train(f"{folder}/float", folder, use_cpu=True, max_steps=3, learning_rate=1e-2, disable_tqdm=True)
        return
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    train(*sys.argv[1:], max_steps=100, learning_rate=1e-3)


if __name__ == "__main__":
    main()

"""A small language task and a trainer for it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfquant import QuantTrainer, TrainingConfig
from tests.support.tiny_models import build


HAS_NEW_NAME = any(field.name == "activation_checkpointing" for field in fields(TrainingConfig))
CHECKPOINTING = "activation_checkpointing" if HAS_NEW_NAME else "gradient_checkpointing"
"""What the field is called in this release of Transformers."""

QAT4 = {"quantization_mode": "qat", "quantization_bits": 4, "quantization_type": "weight_only"}


def examples(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    windows = [torch.randint(3, 128, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": window, "labels": window} for window in windows]


def config(folder: Path | str, **options: Any) -> TrainingConfig:
    base = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 4, "logging_steps": 2}
    base |= {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return TrainingConfig(output_dir=str(folder), **base | options)


def trainer(
    folder: Path | str, name: str = "llama-tied", model: PreTrainedModel | None = None, **options: Any
) -> QuantTrainer:
    model = build(name) if model is None else model
    return QuantTrainer(model=model, args=config(folder, **options), train_dataset=examples())


def with_dropout() -> PreTrainedModel:
    model = build("llama-tied")
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for a handful of words, with ids below those of the tiny models' vocabulary."""
    words = ["<pad>", "<unk>", "</s>", "a", "the", "cat", "dog", "mat", "cake", "sat", "ate", "on"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def assert_scales_have_a_group(made: QuantTrainer, rate: float) -> None:
    """The optimizer has every parameter that trains once, and those of scales in a group of their own."""
    made.create_optimizer()
    group = made.optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (rate, 0.0, 1e-8)
    assert made.optimizer.param_groups[0]["eps"] == made.args.adam_epsilon
    assert {id(p) for p in group["params"]} == {
        id(p) for name, p in made.model.named_parameters() if name.endswith("_log_scale")
    }
    everything = [id(p) for g in made.optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in made.model.parameters() if p.requires_grad)

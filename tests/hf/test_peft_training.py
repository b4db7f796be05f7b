"""Training PEFT adapters on packed layers: Transformers' Trainer, TRL, checkpointing, preparation, heads."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from hfquant import ConfigError, get_quantization_info, quantize_model_ptq
from hfquant.hf.peft import add_side_adapter
from tests.support.adapters import adapter_state, codes, lora, quantized, same
from tests.support.processes import run_python
from tests.support.tiny_models import TEXT, output, text_inputs
from tests.support.tolerance import SAME_VALUES
from tests.support.training import CHECKPOINTING, examples, tiny_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    base = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 4, "logging_steps": 1}
    base |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **base | options)


def trained(folder: Path | str, model: Any, **options: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=examples())
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic", "int8-static"])
def test_trainer_trains_the_adapter_and_saves_it(scheme: str, tmp_path: Path) -> None:
    base = quantized(scheme=scheme)
    original = codes(base)
    trainer = trained(tmp_path, get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")), max_steps=12)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert same(codes(trainer.model), original)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    loaded = PeftModel.from_pretrained(quantized(scheme=scheme), tmp_path / "adapter")
    assert torch.equal(output(loaded, "llama"), output(trainer.model.eval(), "llama"))


RESUME = """
import sys, torch
torch.set_num_threads(1)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from tests.hf.test_peft_training import trainer_that_saves
folder, resume = sys.argv[1], sys.argv[2] == "resume"
made = trainer_that_saves(folder)
made.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
"""


def trainer_that_saves(folder: str) -> Trainer:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, use_dora=True)
    model = get_peft_model(quantized(), config)
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    return Trainer(model=model, args=arguments(folder, **options), train_dataset=examples())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    found = {}
    for mode in ("start", "resume"):
        done = run_python(RESUME, str(tmp_path / "out"), mode)
        assert done.returncode == 0, done.stderr[-3000:]
        last = tmp_path / "out" / "checkpoint-6"
        names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        found[mode] = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names}
        last.rename(tmp_path / mode)
    assert found["start"] == found["resume"]


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    found = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        options = {} if kwargs is None else {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": kwargs}
        torch.manual_seed(0)
        model = get_peft_model(quantized(), LoraConfig(r=4, target_modules="all-linear"))
        if kwargs is not None:
            model.enable_input_require_grads()
        found.append(losses(trained(tmp_path, model, **options)))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_preparation_for_training_is_that_of_bitsandbytes(reentrant: bool) -> None:
    """Frozen, other parameters in float32, checkpointing on, and gradients reach the adapters through it."""
    model = quantized(embedding_bits=8).to(torch.bfloat16)
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert prepared is model
    assert not hasattr(model, "is_loaded_in_8bit")
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert checkpoints(model)
    assert model.model.embed_tokens(torch.tensor([[1]])).dtype == torch.float32
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    ids = text_inputs()["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for n, p in adapted.named_parameters() if "layers.0" in n and "lora_B" in n)


def checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_preparation_without_checkpointing() -> None:
    model = prepare_model_for_kbit_training(quantized(), use_gradient_checkpointing=False)
    assert not checkpoints(model)


def classifier(skip: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TEXT, num_labels=4))
    fields = {"skip_modules": ["classifier"]} if skip else {}
    return quantize_model_ptq(model.eval(), quantization_bits=4, algorithm="rtn", progress=False, **fields)


@pytest.mark.parametrize("skip", [True, False], ids=["float head", "packed head"])
def test_a_head_trains_in_full_and_stays_float_after_merging(skip: bool, tmp_path: Path) -> None:
    model = get_peft_model(classifier(skip), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert type(head) is nn.Linear
    assert head.weight.requires_grad
    labels = torch.tensor([2])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = head.weight.detach().clone()
    model(**text_inputs(), labels=labels).loss.backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(classifier(skip), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    merged = model.merge_and_unload()
    assert type(merged.classifier) is nn.Linear
    merged.save_pretrained(tmp_path / "merged")
    shipped = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(shipped), logits(merged))
    reasons = {kept.name: kept.reason for kept in get_quantization_info(shipped).kept}
    assert "classifier.weight" in reasons


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**text_inputs()).logits


def test_a_tied_packed_head_does_not_train_in_full() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"lm_head, which shares its packed weight with model\.embed_tokens"):
        get_peft_model(quantized("llama-tied", embedding_bits=8), config)


def test_the_side_adapter_knows_its_task_and_layers() -> None:
    model = add_side_adapter(quantized("llama-tied", embedding_bits=8), rank=8, dropout=0.1)
    config = model.peft_config["default"]
    assert (config.task_type, config.r, config.lora_alpha, config.lora_dropout) == ("CAUSAL_LM", 8, 8, 0.1)
    assert len(adapter_state(model)) == 28
    assert not any("lm_head" in name for name in adapter_state(model))
    head = add_side_adapter(classifier(skip=False), rank=8, alpha=4.0)
    assert head.peft_config["default"].task_type == "SEQ_CLS"
    assert head.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    few = add_side_adapter(quantized(), target_modules=["q_proj"])
    assert len(adapter_state(few)) == 4
    with pytest.raises(ConfigError, match="quantize the model first"):
        add_side_adapter(nn.Sequential(nn.Linear(64, 64)))


def test_autocast_trains(tmp_path: Path) -> None:
    trainer = trained(tmp_path, lora(quantized()), bf16=True)
    assert len(set(losses(trainer))) == 4


def test_trl_trains_an_adapter_it_made_itself(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = quantized()
    original = codes(base)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            max_steps=3,
            max_length=16,
            logging_steps=1,
            learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"text": ["a cat sat on a mat", "a dog ate the cake"] * 8}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert len(set(losses(trainer))) == 3
    assert same(codes(trainer.model), original)
    batch = {"input_ids": text_inputs()["input_ids"], "labels": text_inputs()["input_ids"]}
    tiles, plain = trainer.model.eval()(**batch, fused_lm_head=True).loss, trainer.model(**batch).loss
    torch.testing.assert_close(tiles, plain, **SAME_VALUES)  # the packed head, as TRL reads it
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    assert torch.equal(output(loaded, "llama"), output(trainer.model.eval(), "llama"))
    merged = trainer.model.merge_and_unload()
    assert merged.merge_report.layers == 14

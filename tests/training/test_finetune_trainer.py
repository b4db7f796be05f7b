"""QuantTrainer on quantized models: training, saving, exact resuming, and runs that are killed."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from hfquant import (
    ConfigError,
    FinetuneCallback,
    FormatError,
    QuantTrainer,
    get_quantization_info,
    merge_adapters,
    prepare_model_for_finetuning,
    verify_checkpoint,
)
from hfquant.hf.finetune import finetune_state
from hfquant.hf.finetune_checkpoint import TRAINING_STATE
from hfquant.training.callback import RECORD
from hfquant.training.staged_checkpoints import STAGING
from tests.support.finetune import packed_model
from tests.support.processes import run_python
from tests.support.tiny_models import output
from tests.support.training import CHECKPOINTING, assert_scales_have_a_group, config, examples, with_dropout


pytestmark = pytest.mark.usefixtures("reference_kernels")

FINETUNE = {"enable_quantized_finetuning": True, "adapter_rank": 4, "learning_rate": 1e-2}
ADAPTERS = ["grid", "scales"]
SAVES = {"save_strategy": "steps", "save_steps": 2}


def trainer(folder: Path | str, scheme: str = "int4", **options: Any) -> QuantTrainer:
    model = packed_model("llama-tied", scheme, model=with_dropout())
    return QuantTrainer(model=model, args=config(folder, **FINETUNE | options), train_dataset=examples())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic", "int8-static"])
def test_it_trains_and_saves_the_quantized_model(scheme: str, adapter: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, scheme, adapter=adapter, **SAVES)
    before = output(made.model.eval(), "llama-tied")
    size = get_quantization_info(made.model).bytes_after
    made.train()
    expected = output(made.model.eval(), "llama-tied")
    assert not torch.equal(expected, before)
    made.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-4"):
        reloaded = type(made.model).from_pretrained(folder)
        assert torch.equal(output(reloaded, "llama-tied"), expected)
        info = get_quantization_info(reloaded)
        assert info.bytes_after == size
        assert (info.finetuning.codes_moved > 0) == (adapter == "grid")
        assert info.finetuning.scales_moved > 0
        assert verify_checkpoint(folder, progress=False).problems == ()
    assert not (tmp_path / "final" / TRAINING_STATE).exists()
    flips = [entry["code_flips"] for entry in made.state.log_history if "code_flips" in entry]
    assert len(flips) == (2 if adapter == "grid" else 0)
    made.train()  # saving left it trainable
    assert torch.equal(output(merge_adapters(made.model).eval(), "llama-tied"), output(made.model, "llama-tied"))


def test_a_training_step_works_and_accumulates_and_checkpoints_activations(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.create_optimizer()
    batch = made.data_collator(examples()[:2])
    loss = made.training_step(made.model, batch)
    assert float(loss) > 0
    assert any(p.grad is not None for p in made.model.parameters())
    losses = []
    reentrant = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    for options in ({}, {CHECKPOINTING: True}, reentrant):
        made = trainer(tmp_path, gradient_accumulation_steps=2, **options)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] == losses[2]


def test_scales_have_their_own_learning_rate_and_adapters_that_of_the_config(tmp_path: Path) -> None:
    made = trainer(tmp_path, scale_learning_rate=5e-4, weight_decay=0.1)
    assert_scales_have_a_group(made, 5e-4)
    frozen = trainer(tmp_path, scale_learning_rate=0)
    assert not any(p.requires_grad for n, p in frozen.model.named_parameters() if n.endswith("_log_scale"))


PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from tests.training.test_finetune_trainer import trainer
folder, fields, resume = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "resume"
made = trainer(folder, **fields)
made.train(resume_from_checkpoint=True if resume else None)
"""

FILES = (
    "model.safetensors",
    "adapter_model.safetensors",
    TRAINING_STATE,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a checkpoint holds; of tensors, not of headers, whose order differs, nor of a pickle's keys."""
    found = {}
    for name in FILES:
        if not (folder / name).is_file():
            continue
        if name.endswith(".safetensors"):
            for key, tensor in load_file(folder / name).items():
                found[f"{name} {key}"] = sha256(tensor)
        elif name == "optimizer.pt":
            content = torch.load(folder / name)
            states = [(i, key, t) for i, state in content["state"].items() for key, t in state.items()]
            found |= {f"{name} {place} {i} {key}": sha256(t) for place, (i, key, t) in enumerate(states)}
            found[name] = repr(content["param_groups"])
        else:
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize(("adapter", "scheme"), [("grid", "int4"), ("scales", "int8-static"), ("side", "int8-dynamic")])
def test_resuming_in_a_new_process_is_exact(adapter: str, scheme: str, tmp_path: Path) -> None:
    fields = {"adapter": adapter, "scheme": scheme, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    fields |= {"adapter_dropout": 0.1} if adapter == "side" else {}
    trainer(tmp_path / "whole", **fields).train()
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    done = run_python(PROGRAM, str(tmp_path / "half"), json.dumps(fields), "resume", HFQUANT_KERNELS="reference")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = digests(tmp_path / "whole" / "checkpoint-6")
    assert len(expected) > 30
    assert digests(tmp_path / "half" / "checkpoint-6") == expected


def test_resuming_from_a_loaded_checkpoint_is_exact_too(tmp_path: Path) -> None:
    """The checkpoint holds all there is: the model it is resumed with may be the checkpoint itself."""
    whole = trainer(tmp_path / "whole", max_steps=4, **SAVES)
    whole.train()
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", half / "checkpoint-2")
    model = type(whole.model).from_pretrained(half / "checkpoint-2", attn_implementation="sdpa")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    made = QuantTrainer(model=model, args=config(half, max_steps=4, **FINETUNE | SAVES), train_dataset=examples())
    made.train(resume_from_checkpoint=True)
    assert digests(half / "checkpoint-4") == digests(tmp_path / "whole" / "checkpoint-4")


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2, **SAVES).train()
    checkpoint = tmp_path / "checkpoint-2"
    record = json.loads((checkpoint / RECORD).read_text())
    assert record["quantization_mode"] == "finetune"
    for scheme, options, message in (
        ("int8-dynamic", {}, "it trained .* for int4.*, this run trains it for int8-channel-dynamic"),
        ("int4", {"adapter": "scales"}, "adapter is 'grid', this run's is 'scales'"),
        ("int4", {"adapter_rank": 8}, "adapter_rank is 4, this run's is 8"),
        ("int4", {"adapter_target_modules": ["q_proj"]}, "it trained .* for int4.*, this run trains it for None"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, scheme, **SAVES | options).train(resume_from_checkpoint=str(checkpoint))
    state = load_file(checkpoint / TRAINING_STATE)
    lacking = {name: t for name, t in state.items() if not name.endswith("0.mlp.up_proj.weight_lora_B")}
    save_file(lacking, checkpoint / TRAINING_STATE)
    with pytest.raises(FormatError, match=r"missing tensors \['model.layers.0.mlp.up_proj.weight_lora_B'\]"):
        trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / TRAINING_STATE).unlink()
    with pytest.raises(FormatError, match="cannot be resumed"):
        trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / RECORD).unlink()
    with pytest.raises(ConfigError, match="not a checkpoint of quantized fine-tuning"):
        trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(checkpoint))


class Killed(Exception):
    pass


def test_a_save_that_is_cut_short_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, max_steps=6, **SAVES)
    whole = made._save_rng_state

    def dies(folder: str) -> None:
        if made.state.global_step == 4:
            raise Killed
        whole(folder)

    monkeypatch.setattr(made, "_save_rng_state", dies)
    with pytest.raises(Killed):
        made.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [STAGING, "checkpoint-2"]
    again = trainer(tmp_path, max_steps=6, **SAVES)
    again.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_old_checkpoints_are_deleted_and_the_best_is_kept_and_loaded(tmp_path: Path) -> None:
    options = {"save_total_limit": 2, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    model = packed_model("llama-tied")
    args = config(tmp_path, max_steps=6, **FINETUNE | SAVES | options | {"learning_rate": 0.3})
    made = QuantTrainer(model=model, args=args, train_dataset=examples(), eval_dataset=examples(4))
    made.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert {f"checkpoint-{best}", "checkpoint-6"} <= {path.name for path in tmp_path.iterdir()}
    reloaded = type(model).from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(output(reloaded, "llama-tied"), output(made.model.eval(), "llama-tied"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == made.state.best_model_checkpoint


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_trainer_of_transformers_trains_and_resumes_exactly(adapter: str, tmp_path: Path) -> None:
    def plain(folder: Path) -> Trainer:
        model = packed_model("llama-tied", model=with_dropout())
        prepare_model_for_finetuning(model, adapter, rank=4, progress=False)
        args = config(folder, max_steps=4, learning_rate=1e-2, **SAVES)
        return Trainer(model=model, args=args, train_dataset=examples(), callbacks=[FinetuneCallback()])

    whole = plain(tmp_path / "whole")
    whole.train()
    reloaded = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(output(reloaded, "llama-tied"), output(whole.model.eval(), "llama-tied"))
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    plain(tmp_path / "half").train(resume_from_checkpoint=True)
    assert digests(tmp_path / "half" / "checkpoint-4") == digests(tmp_path / "whole" / "checkpoint-4")


def test_the_trainer_of_transformers_loads_the_best_model(tmp_path: Path) -> None:
    """It loads the packed state into the layers in training, which start again from there."""
    model = packed_model("llama-tied")
    prepare_model_for_finetuning(model, rank=4, progress=False)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
    args = config(tmp_path, max_steps=4, **SAVES | best)
    made = Trainer(model=model, args=args, train_dataset=examples(), eval_dataset=examples(4))
    made.train()
    reloaded = type(model).from_pretrained(made.state.best_model_checkpoint)
    assert torch.equal(output(model.eval(), "llama-tied"), output(reloaded, "llama-tied"))


def test_side_adapters_are_saved_as_adapters(tmp_path: Path) -> None:
    made = trainer(tmp_path, adapter="side", adapter_dropout=0.1, **SAVES)
    codes = made.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    made.train()
    made.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    assert torch.equal(made.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, codes)
    record = json.loads((tmp_path / "checkpoint-4" / RECORD).read_text())
    assert (record["adapter"], record["adapter_rank"]) == ("side", 4)
    with pytest.raises(ConfigError, match="adapter is 'side', this run's is 'grid'"):
        trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    merged = merge_adapters(made.model)
    assert get_quantization_info(merged).is_quantized


def test_misuse_is_refused(tmp_path: Path) -> None:
    prepared = packed_model("llama-tied")
    prepare_model_for_finetuning(prepared, "scales", progress=False)
    with pytest.raises(ConfigError, match="adapter='grid', but the model was prepared with adapter='scales'"):
        QuantTrainer(model=prepared, args=config(tmp_path, **FINETUNE), train_dataset=examples())
    args = config(tmp_path, **FINETUNE | {"adapter": "scales"})
    kept = QuantTrainer(model=prepared, args=args, train_dataset=examples())
    assert finetune_state(kept.model).adapter == "scales"
    with pytest.raises(ConfigError, match="model_init"):
        QuantTrainer(model_init=lambda: packed_model("llama-tied"), args=config(tmp_path, **FINETUNE))
    with pytest.raises(ConfigError, match="cannot be dropped"):
        config(tmp_path, **FINETUNE | {"adapter_dropout": 0.1})
    with pytest.raises(ConfigError, match="no Transformers model"):
        QuantTrainer(model=torch.nn.Linear(4, 4), args=config(tmp_path, **FINETUNE), train_dataset=examples())
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=packed_model("llama-tied"), args=config(tmp_path), train_dataset=examples())
    diverged = trainer(tmp_path)
    diverged.model.model.layers[0].mlp.up_proj.weight_log_scale.data.fill_(torch.inf)
    with pytest.raises(Exception, match="NaN or infinite"):
        diverged.train()

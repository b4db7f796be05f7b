"""adapter_delay_steps: training that is not rounded at first, all of it following from the number of the step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hfquant import ConfigError, FinetuneCallback, QuantTrainer, merge_adapters, prepare_model_for_finetuning
from hfquant.finetune.adapted import adapted_modules, movement
from hfquant.hf.rounding import is_rounded
from hfquant.training.callback import RECORD
from tests.support.finetune import packed_model
from tests.support.processes import run_python
from tests.support.tiny_models import output
from tests.support.training import config, examples, with_dropout
from tests.training.test_finetune_trainer import FINETUNE, PROGRAM, SAVES, digests, trainer


pytestmark = pytest.mark.usefixtures("reference_kernels")


class Watch(TrainerCallback):
    """Writes down, when each step begins and ends, whether the model is rounded."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, bool]] = []
        self.codes: dict[int, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(("begin", state.global_step, is_rounded(model)))
        self.codes[state.global_step] = next(adapted_modules(model))[1].weight.detach().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(("end", state.global_step, is_rounded(model)))


def test_the_weights_are_rounded_before_the_first_step_after_the_delay(tmp_path: Path) -> None:
    made, watch = trainer(tmp_path, adapter_delay_steps=2, **SAVES), Watch()
    made.add_callback(watch)
    parameters = {name: id(p) for name, p in made.model.named_parameters()}
    made.train()
    assert watch.seen == [
        ("begin", 0, False),
        ("end", 1, False),
        ("begin", 1, False),
        ("end", 2, False),
        ("begin", 2, True),
        ("end", 3, True),
        ("begin", 3, True),
        ("end", 4, True),
    ]
    assert torch.equal(watch.codes[0], watch.codes[1])
    assert not torch.equal(watch.codes[1], watch.codes[2])
    assert torch.equal(watch.codes[2], watch.codes[3])
    assert {name: id(p) for name, p in made.model.named_parameters()} == parameters
    steps = {int(made.optimizer.state[m.weight_lora_B]["step"]) for _, m in adapted_modules(made.model)}
    assert steps == {2}  # the optimizer started anew, too
    assert movement(made.model).codes_moved > 0
    expected = output(made.model.eval(), "llama-tied")
    made.save_model(str(tmp_path / "final"))
    assert torch.equal(output(type(made.model).from_pretrained(tmp_path / "final"), "llama-tied"), expected)
    assert torch.equal(output(merge_adapters(made.model), "llama-tied"), expected)


@pytest.mark.parametrize(
    ("delay", "scheme", "distilled"),
    [(2, "int4", 0), (2, "int4", 0.5), (3, "int4-residual", 1), (4, "int8-static", 0), (4, "int4-asymmetric", 0.5)],
)
def test_resuming_in_a_new_process_is_exact(delay: int, scheme: str, distilled: float, tmp_path: Path) -> None:
    """The run is cut after three steps: behind the rounding, at it and before it."""
    fields = {"adapter": "grid", "scheme": scheme, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    fields |= {"adapter_delay_steps": delay, "calibration_batches": 3, "distillation_weight": distilled}
    trainer(tmp_path / "whole", **fields).train()
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    done = run_python(PROGRAM, str(tmp_path / "half"), json.dumps(fields), "resume", HFQUANT_KERNELS="reference")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = digests(tmp_path / "whole" / "checkpoint-6")
    assert len(expected) > 30
    assert digests(tmp_path / "half" / "checkpoint-6") == expected


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_the_trainer_of_transformers_resumes_exactly(delay: int, tmp_path: Path) -> None:
    data = [{"input_ids": row["input_ids"].unsqueeze(0)} for row in examples(3)]

    def plain(folder: Path) -> Trainer:
        model = packed_model("llama-tied", model=with_dropout())
        prepare_model_for_finetuning(model, rank=4, progress=False)
        callbacks = [FinetuneCallback(delay_steps=delay, calibration_data=data)]
        args = config(folder, max_steps=4, learning_rate=1e-2, **SAVES)
        return Trainer(model=model, args=args, train_dataset=examples(), callbacks=callbacks)

    whole = plain(tmp_path / "whole")
    whole.train()
    assert is_rounded(whole.model)
    whole.save_model(str(tmp_path / "final"))
    reloaded = type(whole.model).from_pretrained(tmp_path / "final")
    assert torch.equal(output(reloaded, "llama-tied"), output(whole.model.eval(), "llama-tied"))
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    plain(tmp_path / "half").train(resume_from_checkpoint=True)
    assert digests(tmp_path / "half" / "checkpoint-4") == digests(tmp_path / "whole" / "checkpoint-4")


def test_the_same_batches_in_every_process_whatever_was_drawn_before(tmp_path: Path) -> None:
    class Draws:
        def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            ids = torch.stack([row["input_ids"] for row in rows])
            return {"input_ids": torch.where(torch.rand(ids.shape) < 0.5, ids, 5), "labels": ids}

    made = QuantTrainer(
        model=packed_model("llama-tied"),
        args=config(tmp_path, **FINETUNE | {"adapter_delay_steps": 2, "calibration_batches": 2}),
        train_dataset=examples(),
        data_collator=Draws(),
    )
    state = torch.get_rng_state()
    first = list(made._first_batches(shared=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = list(made._first_batches(shared=True))
    assert len(first) == len(second) == 2
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    assert torch.equal(first[1]["labels"], torch.stack([row["labels"] for row in examples()[2:4]]))


class Stops(TrainerCallback):
    """Ends training after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_a_run_that_ends_before_the_rounding_saves_no_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, adapter_delay_steps=3, save_strategy="steps", save_steps=1)
    made.add_callback(Stops())
    made.train()
    assert (tmp_path / "checkpoint-1").is_dir()  # what a checkpoint needs is in it
    for refused in (
        lambda: made.save_model(str(tmp_path / "final")),
        lambda: made.model.save_pretrained(tmp_path / "final"),
        lambda: merge_adapters(made.model),
    ):
        with pytest.raises(ConfigError, match="not rounded yet"):
            refused()
    made.remove_callback(Stops)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    made.save_model(str(tmp_path / "final"))


def test_the_best_model_is_one_that_was_rounded(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that the first steps are best
    args = config(tmp_path, **FINETUNE | SAVES | options | {"adapter_delay_steps": 2, "learning_rate": 0.3})
    made = QuantTrainer(model=packed_model("llama-tied"), args=args, train_dataset=examples(), eval_dataset=examples(4))
    made.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry}
    assert max(losses, key=losses.get) <= 2
    best = max((3, 4), key=losses.get)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_resuming_with_another_delay_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, adapter_delay_steps=1, max_steps=2, **SAVES).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / RECORD).read_text())["adapter_delay_steps"] == 1
    with pytest.raises(ConfigError, match="adapter_delay_steps is 1, this run's is 0"):
        trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(checkpoint))
    record = json.loads((checkpoint / RECORD).read_text())
    del record["adapter_delay_steps"]  # as earlier versions wrote it
    (checkpoint / RECORD).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="adapter_delay_steps is None, this run's is 1"):
        trainer(tmp_path, adapter_delay_steps=1, **SAVES).train(resume_from_checkpoint=str(checkpoint))
    trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(checkpoint))


def test_misuse_is_refused(tmp_path: Path) -> None:
    for fields, message in (
        ({"adapter_delay_steps": -1}, "adapter_delay_steps=-1: expected an integer at least 0"),
        ({"adapter_delay_steps": 2.5}, "adapter_delay_steps=2.5: expected an integer"),
        ({"adapter_delay_steps": 2, "adapter": "scales"}, "adapter_delay_steps=2 needs .* adapter='grid'"),
        ({"adapter_delay_steps": 2, "adapter": "side"}, "adapter_delay_steps=2 needs .* adapter='grid'"),
        ({"adapter_delay_steps": 2, "enable_quantized_finetuning": False}, "adapter_delay_steps=2 needs enable"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, **FINETUNE | fields)
    with pytest.raises(ConfigError, match="adapter_delay_steps=4 of 4 steps: the weights would never be rounded"):
        trainer(tmp_path, adapter_delay_steps=4).train()
    with pytest.raises(ConfigError, match="delay_steps=3 needs calibration_data"):
        FinetuneCallback(delay_steps=3)
    with pytest.raises(ConfigError, match="delay_steps=-3: expected an integer from 0"):
        FinetuneCallback(delay_steps=-3, calibration_data=[])
    model = packed_model("llama-tied")
    prepare_model_for_finetuning(model, "scales", progress=False)
    callback = FinetuneCallback(delay_steps=2, calibration_data=[{"input_ids": torch.tensor([[3, 4]])}])
    with pytest.raises(ConfigError, match="only adapter='grid' trains inside the rounding"):
        Trainer(model=model, args=config(tmp_path), train_dataset=examples(), callbacks=[callback]).train()

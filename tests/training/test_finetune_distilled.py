"""Distillation where the model is quantized: scales that train for the codes of PTQ, and delayed rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hfquant import ConfigError, FormatError, QuantTrainer, quantize_model_ptq, verify_checkpoint
from hfquant.finetune.adapted import adapted_modules, movement
from hfquant.hf.finetune_checkpoint import TEACHER
from hfquant.hf.rounding import unrounded_copy
from hfquant.nn.swap import packed_modules
from hfquant.numerics.metrics import sqnr_db
from hfquant.qat.distill import distillation_loss
from tests.support.finetune import packed_model
from tests.support.tiny_models import build, output
from tests.support.tolerance import BFLOAT16_SQNR_DB, SAME_VALUES
from tests.support.training import QAT4, config, examples
from tests.training.test_finetune_trainer import FINETUNE, SAVES, digests, trainer


pytestmark = pytest.mark.usefixtures("reference_kernels")

SCALES = QAT4 | {"qat_variant": "scales", "algorithm": "gptq", "calibration_batches": 3, "scale_learning_rate": 1e-2}
DISTILS = {"distillation_weight": 1.0}


def scales_trainer(folder: Path, **options: Any) -> QuantTrainer:
    args = config(folder, **SCALES | DISTILS | options)
    return QuantTrainer(model=build("llama-tied"), args=args, train_dataset=examples())


def divergence(made: QuantTrainer, teacher: torch.nn.Module) -> float:
    """Mean KL of ``teacher`` to the model of ``made`` on its training data."""
    made.model.eval()
    with torch.no_grad():
        rows = torch.stack([row["input_ids"] for row in examples()])
        total, count = distillation_loss(made.model(rows).logits, teacher(rows).logits, None, temperature=1.0)
    return float(total / count)


def test_scales_train_for_the_codes_of_ptq(tmp_path: Path) -> None:
    teacher = build("llama-tied").eval()
    made = scales_trainer(tmp_path, max_steps=12, **SAVES)
    expected = build("llama-tied")
    scheme = {"quantization_bits": 4, "quantization_type": "weight_only", "algorithm": "gptq"}
    quantize_model_ptq(expected, calibration_data=made._first_batches(shared=True), progress=False, **scheme)
    codes = {name: m.packed().weight for name, m in packed_modules(expected)}
    before = divergence(made, teacher)
    assert torch.equal(output(made.model, "llama-tied"), output(expected.eval(), "llama-tied"))
    made.train()
    assert divergence(made, teacher) < 0.95 * before
    assert movement(made.model).codes_moved == 0
    assert movement(made.model).scales_moved > 0
    made.save_model(str(tmp_path / "final"))
    reloaded = type(made.model).from_pretrained(tmp_path / "final")
    assert torch.equal(output(reloaded, "llama-tied"), output(made.model.eval(), "llama-tied"))
    assert all(torch.equal(m.packed().weight, codes[name]) for name, m in packed_modules(reloaded))
    found = reloaded.config.quantization_config
    assert (found.quantization_mode, found.finetuning["adapter"]) == ("qat", "scales")
    assert verify_checkpoint(tmp_path / "final", progress=False).problems == ()


def test_training_of_scales_resumes_exactly(tmp_path: Path) -> None:
    scales_trainer(tmp_path / "whole", **SAVES).train()
    scales_trainer(tmp_path / "half", max_steps=4, **SAVES | {"save_steps": 2}).train()
    made = scales_trainer(tmp_path / "half", **SAVES)
    made.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert digests(tmp_path / "half" / "checkpoint-4") == digests(tmp_path / "whole" / "checkpoint-4")


class Unrounded(TrainerCallback):
    """What the model computes at the end of step ``step``, before it is rounded."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, torch.empty(0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.seen = output(model.eval(), "llama-tied")
            model.train()


def test_after_the_rounding_the_model_learns_from_what_it_was_before(tmp_path: Path) -> None:
    made, watch = trainer(tmp_path, adapter_delay_steps=2, **DISTILS, **SAVES), Unrounded(2)
    made.add_callback(watch)
    made.train()
    plain = trainer(tmp_path / "plain", adapter_delay_steps=2, **SAVES)
    plain.train()
    assert made._teacher is not None
    assert not any(p.requires_grad for p in made._teacher.parameters())
    theirs = output(made._teacher, "llama-tied").float()
    assert sqnr_db(watch.seen, theirs) >= BFLOAT16_SQNR_DB
    losses = [[e["loss"] for e in one.state.log_history if "loss" in e] for one in (made, plain)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] < 0.5 < losses[1][1]  # a divergence from itself, and the loss of labels
    made.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / TEACHER).exists()
    assert not (tmp_path / "checkpoint-2" / TEACHER).exists()
    assert verify_checkpoint(tmp_path / "checkpoint-4", progress=False).problems == ()
    made.train()  # anew: what was learned from in the run before counts no more
    assert [entry["loss"] for entry in made.state.log_history if "loss" in entry][0] > 1


@pytest.mark.parametrize(
    ("options", "rests"), [({}, True), ({"distillation_weight": 0.5}, False), ({"scale_learning_rate": 0.0}, False)]
)
def test_adapters_rest_where_all_there_is_to_learn_is_what_the_model_was(
    options: dict[str, float], rests: bool, tmp_path: Path
) -> None:
    made = trainer(tmp_path, adapter_delay_steps=2, **DISTILS | SAVES | options)
    made.train()
    modules = dict(adapted_modules(made.model)).values()
    assert rests == (not any(module._parameters["weight_lora_B"].any() for module in modules))
    scales_trained = options.get("scale_learning_rate") != 0
    assert all(bool(module._parameters["weight_log_scale"].any()) == scales_trained for module in modules)
    with_state = {name for name, p in made.model.named_parameters() if p in made.optimizer.state}
    assert rests == (not any("lora" in name for name in with_state))


def test_a_damaged_teacher_is_refused(tmp_path: Path) -> None:
    options = {"adapter_delay_steps": 1, **DISTILS, **SAVES}
    trainer(tmp_path, **options).train()
    file = tmp_path / "checkpoint-2" / TEACHER
    content = file.read_bytes()
    for damaged in (content[:-100], b""):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match="hfquant_teacher.safetensors"):
            trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    file.unlink()
    with pytest.raises(FormatError, match=r"hfquant_teacher.safetensors: .*cannot be resumed"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_scales_learn_from_a_teacher_that_is_given(tmp_path: Path) -> None:
    args = config(tmp_path, **FINETUNE | DISTILS | {"adapter": "scales", "max_steps": 12})
    teacher = build("llama-tied")
    made = QuantTrainer(model=packed_model("llama-tied"), args=args, train_dataset=examples(), teacher_model=teacher)
    before = divergence(made, teacher)
    made.train()
    assert divergence(made, teacher) < before


@pytest.mark.parametrize("adapter", ["grid", "scales", "side"])
def test_only_tokens_that_are_predicted_count(adapter: str, tmp_path: Path) -> None:
    """The logits at a position are those of the next token, whose label says whether it counts."""
    args = config(tmp_path, **FINETUNE | DISTILS | {"adapter": adapter, "distillation_temperature": 2.0})
    teacher = build("llama-tied").eval()
    made = QuantTrainer(model=packed_model("llama-tied"), args=args, train_dataset=examples(), teacher_model=teacher)
    rows = torch.stack([row["input_ids"] for row in examples(2)])
    labels = rows.clone()
    labels[0, :7], labels[1, 9:] = -100, -100
    found = made.compute_loss(made.model.train(), {"input_ids": rows, "labels": labels})
    ours, theirs = (model(rows).logits.detach().double() / 2 for model in (made.model, teacher))
    divergence = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    expected = 4 * torch.cat([divergence[0, 6:-1], divergence[1, :8]]).mean()
    torch.testing.assert_close(found.detach().double(), expected, **SAME_VALUES)


def test_a_model_that_is_not_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Sequential is no Transformers model"):
        QuantTrainer(
            model=torch.nn.Sequential(torch.nn.Linear(64, 64)),
            args=config(tmp_path, **QAT4 | {"qat_variant": "scales"}),
        )


def test_somebody_to_learn_from_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="distillation_weight=1.0 has nobody to learn from"):
        trainer(tmp_path, **DISTILS)


def test_an_unrounded_copy_leaves_the_model_alone() -> None:
    with pytest.raises(ConfigError, match="not in fine-tuning"):
        unrounded_copy(packed_model("llama-tied"))
    assert not list(adapted_modules(packed_model("llama-tied")))

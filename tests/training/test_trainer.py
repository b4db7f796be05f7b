import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hfquant import ConfigError, FormatError, QuantTrainer, get_quantization_info, quantize_model_ptq
from hfquant.qat.prepare import fake_quant_modules
from hfquant.training.callback import RECORD
from tests.support.processes import run_python
from tests.support.tiny_models import build, output
from tests.support.training import (
    CHECKPOINTING,
    QAT4,
    assert_scales_have_a_group,
    config,
    examples,
    trainer,
    with_dropout,
)


# What was trained is what is deployed, bit for bit, on the reference kernels.
pytestmark = pytest.mark.usefixtures("reference_kernels")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_with_the_defaults_it_is_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kind in (Trainer, QuantTrainer):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        made = kind(
            model=with_dropout(), args=config("out", save_strategy="steps", save_steps=2), train_dataset=examples()
        )
        made.train()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        made.save_model("final")
        found.append((losses, digests(folder)))
    assert found[0] == found[1]
    assert any(name.endswith("checkpoint-4/optimizer.pt") for name in found[0][1])


def test_ptq_quantizes_when_training_ends(tmp_path: Path) -> None:
    plain, quantizes = trainer(tmp_path), trainer(tmp_path, quantization_mode="ptq", quantization_bits=4)
    plain.train()
    quantizes.train()
    expected = quantize_model_ptq(plain.model, quantization_bits=4, progress=False).eval()
    assert torch.equal(output(quantizes.model.eval(), "llama"), output(expected, "llama"))
    quantizes.save_model(str(tmp_path / "final"))
    assert get_quantization_info(type(expected).from_pretrained(tmp_path / "final")).quantization_mode == "ptq"
    with pytest.raises(ConfigError, match="was quantized when training ended"):
        quantizes.train()


def test_ptq_calibrates_on_training_data_when_training_ends(tmp_path: Path) -> None:
    made = trainer(tmp_path, quantization_mode="ptq", quantization_bits=4, algorithm="gptq", calibration_batches=2)
    made.train()
    assert {result.method for result in made.model.hf_quantizer.results} >= {"gptq"}


RUNS: dict[str, dict[str, Any]] = {
    "weight-only": {},
    "blend": {"qat_blend_steps": 2},
    "dynamic": {"quantization_type": "dynamic", "quantization_bits": 8},
    "static": {"quantization_type": "static", "quantization_bits": 8, "calibration_batches": 2},
    "accumulated": {"gradient_accumulation_steps": 2, CHECKPOINTING: True},
    "lora": {"qat_variant": "lora", "distillation_weight": 1.0},
    "distilled": {"distillation_weight": 0.5, "distillation_temperature": 2.0},
    "calibrated": {"algorithm": "gptq", "calibration_batches": 2, "distillation_weight": 1.0},
    "calibrated-lora": {"algorithm": "gptq", "calibration_batches": 2, "qat_variant": "lora"},
}


@pytest.mark.parametrize("name", RUNS)
def test_qat_saves_what_it_trained(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, **QAT4 | RUNS[name])
    before = output(made.model.eval(), "llama")
    made.train()
    expected = output(made.model.eval(), "llama")
    assert not torch.equal(expected, before)
    made.save_model(str(tmp_path / "final"))
    reloaded = type(made.model).from_pretrained(tmp_path / "final")
    assert torch.equal(output(reloaded, "llama"), expected)
    assert get_quantization_info(reloaded).quantization_mode == "qat"
    assert torch.equal(output(made.model, "llama"), expected)
    flips = [entry["code_flips"] for entry in made.state.log_history if "code_flips" in entry]
    assert len(flips) == 2
    assert 0 < flips[0] < 1
    made.train()  # saving left it trainable


def test_gradient_checkpointing_and_kept_codes_change_no_loss(tmp_path: Path) -> None:
    losses = []
    for options in ({}, {CHECKPOINTING: True}, {CHECKPOINTING + "_kwargs": {"use_reentrant": True}}):
        options = options | ({CHECKPOINTING: True} if options else {})
        static = {"quantization_type": "static", "quantization_bits": 8, "gradient_accumulation_steps": 2}
        made = trainer(tmp_path, **QAT4 | static | options)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] == losses[2]


def test_autocast_trains_and_saves_what_it_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path, bf16=True, **QAT4)
    made.train()
    model = made.accelerator.unwrap_model(made.model, keep_fp32_wrapper=False).eval()
    assert model.lm_head.weight.dtype == torch.float32
    made.save_model(str(tmp_path / "final"))
    reloaded = type(model).from_pretrained(tmp_path / "final")
    assert torch.equal(output(reloaded, "llama"), output(model, "llama"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(reloaded, "llama"), output(model, "llama"))


def test_scales_have_their_own_learning_rate(tmp_path: Path) -> None:
    made = trainer(tmp_path, weight_decay=0.1, adam_epsilon=1e-4, scale_learning_rate=5e-4, **QAT4)
    assert_scales_have_a_group(made, 5e-4)
    frozen = trainer(tmp_path, scale_learning_rate=0, **QAT4)
    assert not any(p.requires_grad for n, p in frozen.model.named_parameters() if n.endswith("_log_scale"))


RESUME = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.support.training import trainer, with_dropout
folder, fields, resume = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "resume"
made = trainer(folder, model=with_dropout(), save_strategy="steps", save_steps=3, max_steps=6, **fields)
made.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
"""


@pytest.mark.parametrize(
    "fields",
    [QAT4 | {"qat_blend_steps": 4}, QAT4 | RUNS["lora"], QAT4 | RUNS["static"] | {"distillation_weight": 0.5}],
    ids=["full", "lora", "static"],
)
def test_resuming_in_a_new_process_is_exact(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    for mode in ("start", "resume"):
        done = run_python(RESUME, folder, json.dumps(fields), mode)
        assert done.returncode == 0, done.stderr[-3000:]
        last = tmp_path / "out" / "checkpoint-6"
        found = {
            name: digests(last)[name] for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        }
        last.rename(tmp_path / mode)
        if mode == "start":
            expected = found
    assert found == expected


def test_resuming_with_another_scheme_is_refused(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **QAT4 | saves).train()
    checkpoint = tmp_path / "checkpoint-2"
    record = json.loads((checkpoint / RECORD).read_text())
    assert record["quantization_mode"] == "qat"
    assert record["modules"]["lm_head"] == "int8-channel"
    for other, message in (
        ({"group_size": 32}, "it trained .* for int4-g64?|int4-channel.*, this run trains it for int4-g32"),
        ({"qat_variant": "lora"}, "qat_variant is 'full', this run's is 'lora'"),
        ({"quantization_mode": None}, "quantization_mode is 'qat', this run's is None"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, **QAT4 | saves | other).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / RECORD).unlink()
    with pytest.raises(ConfigError, match="not a checkpoint of quantization-aware training"):
        trainer(tmp_path, **QAT4 | saves).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **QAT4 | saves).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_log_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj\.weight_log_scale"):
        trainer(tmp_path, **QAT4 | saves).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class EMACallback(TrainerCallback):
    pass


def test_misuse_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, **QAT4)
    made.add_callback(EMACallback())
    with pytest.raises(ConfigError, match="EMACallback averages weights"):
        made.train()
    with pytest.raises(ConfigError, match="qat_blend_steps=4 of 4 steps"):
        trainer(tmp_path, qat_blend_steps=4, **QAT4).train()
    blending = trainer(tmp_path, qat_blend_steps=3, **QAT4)
    blending.train()
    for _, module in fake_quant_modules(blending.model):
        module.blend = 0.75
    with pytest.raises(ConfigError, match="75 % quantization"):
        blending.save_model(str(tmp_path / "final"))
    frozen = build("llama").requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would train"):
        trainer(tmp_path, model=frozen, scale_learning_rate=0, **QAT4).train()
    with pytest.raises(ConfigError, match="model_init"):
        QuantTrainer(model_init=lambda: build("llama"), args=config(tmp_path, **QAT4), train_dataset=examples())
    optimizers = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), None)
    made = QuantTrainer(
        model=build("llama"), args=config(tmp_path, **QAT4), train_dataset=examples(), optimizers=optimizers
    )
    with pytest.raises(ConfigError, match="made before the model was prepared"):
        made.train()
    with pytest.raises(ConfigError, match="not quantized by hfquant"):
        trainer(tmp_path, enable_quantized_finetuning=True)


def test_only_a_prepared_model_is_qat_trainable(tmp_path: Path) -> None:
    packed = quantize_model_ptq(build("llama"), progress=False)
    assert packed.hf_quantizer.is_qat_trainable is False
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=packed, args=config(tmp_path), train_dataset=examples())
    made = trainer(tmp_path, **QAT4)
    assert made.model.hfquant_qat.quantizer.is_qat_trainable is True

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hfquant import ConfigError, HfQuantConfig, QatCallback, get_quantization_info
from hfquant.training.callback import RECORD
from tests.support.tiny_models import build, output
from tests.support.training import config, examples


def test_the_callback_is_enough_for_another_trainer(tmp_path: Path) -> None:
    callback = QatCallback(HfQuantConfig(quantization_bits=4), blend_steps=2)
    args = config(tmp_path, save_strategy="steps", save_steps=2)
    trainer = Trainer(model=build("llama-tied"), args=args, train_dataset=examples(), callbacks=[callback])
    trainer.train()
    assert (tmp_path / "checkpoint-2" / RECORD).is_file()
    trainer.save_model(str(tmp_path / "final"))
    reloaded = type(trainer.model).from_pretrained(tmp_path / "final")
    assert get_quantization_info(reloaded).quantization_mode == "qat"
    assert torch.equal(output(reloaded, "llama"), output(trainer.model.eval(), "llama"))
    assert any("code_flips" in entry for entry in trainer.state.log_history)


def test_a_callback_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(model=build("llama"), args=config(tmp_path), train_dataset=examples())
    trainer.add_callback(QatCallback())
    with pytest.raises(ConfigError, match="when the Trainer is made"):
        trainer.train()

"""The README's Python blocks run as they stand, in order, with small models in place of the reader's."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import build, text_inputs
from tests.support.training import examples


README = (Path(__file__).parents[2] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # the Trainer's default, without an accelerator
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("model")
    namespace = {
        "path": "model",
        "out": "out",
        "fp32_model": AutoModelForCausalLM.from_pretrained("model"),
        "batches": [text_inputs()],
        "dataset": examples(),
        "tokenizer": lambda text, **_: {"input_ids": [ord(letter) % 128 for letter in text]},
        "torch": torch,
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE) for target in targets)

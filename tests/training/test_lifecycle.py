"""Random ways through what can be done with a model: nothing raises, and what must not change the output does not."""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant import (
    ConfigError,
    convert_model_qat,
    dequantize_model,
    get_quantization_info,
    merge_adapters,
    prepare_model_for_finetuning,
    prepare_model_qat,
    quantize_model_ptq,
)
from tests.support.tiny_models import TINY, build, output


pytestmark = pytest.mark.usefixtures("reference_kernels")

NAMES = ("gpt2", "bert", "opt", "bart", "llama-tied", "mixtral", "olmo")
NOT_CAST = ("llama-tied", "mixtral", "olmo")
"""Casting rounds the frequencies of rotary embeddings, which no checkpoint holds: loading them gives others."""

STATES = {
    "float": ("quantize", "prepare_qat"),
    "packed": (
        "tune_grid",
        "tune_scales",
        "dequantize",
        "quantize_again",
        "save",
        "copy",
        "pickle",
        "cast",
        "move",
        "report",
    ),
    "tuned": ("step", "merge", "save", "copy", "cast", "move", "report", "state_dict"),
    "qat": ("step", "convert", "copy", "cast", "move", "state_dict"),
}
LEADS_TO = {
    "quantize": "packed",
    "prepare_qat": "qat",
    "tune_grid": "tuned",
    "tune_scales": "tuned",
    "dequantize": "float",
    "merge": "packed",
    "convert": "packed",
}
CHANGES_OUTPUT = {"quantize", "prepare_qat", "dequantize", "cast", "step"}


class Life:
    """One model, and what is done to it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        torch.manual_seed(seed)
        choose = self.random.choice
        self.name, self.model, self.state = choose(NAMES), None, "float"
        self.model: Any = build(self.name)
        self.options = {
            "quantization_bits": choose((4, 8)),
            "quantization_type": choose(("weight_only", "dynamic", "static")),
            "symmetric": choose((True, False)),
            "embedding_bits": choose((4, 8, 16)),
            "progress": False,
        }
        if self.options["quantization_type"] == "static":
            self.options["calibration_data"] = [TINY[self.name].inputs()] * 2
        self.done: list[str] = [self.name, str(self.options)]

    def go_on(self) -> None:
        action = self.random.choice(STATES[self.state])
        self.done.append(action)
        before = output(self.model, self.name)
        do: Callable[[], Any] = getattr(self, action)
        result = do()
        self.model = self.model if result is None else result
        self.state = LEADS_TO.get(action, self.state)
        if action not in CHANGES_OUTPUT:
            assert torch.equal(output(self.model, self.name), before)

    def quantize(self) -> nn.Module:
        return quantize_model_ptq(self.model, **self.options, keep_residual=self.random.random() < 0.5)

    def prepare_qat(self) -> nn.Module:
        return prepare_model_qat(self.model, **self.options)

    def tune_grid(self) -> nn.Module:
        return prepare_model_for_finetuning(self.model, adapter="grid", rank=4, progress=False)

    def tune_scales(self) -> nn.Module:
        return prepare_model_for_finetuning(self.model, adapter="scales", progress=False)

    def dequantize(self) -> nn.Module:
        return dequantize_model(self.model)

    def quantize_again(self) -> None:
        with pytest.raises(ConfigError):
            quantize_model_ptq(self.model, **self.options)

    def save(self) -> nn.Module | None:
        dtype = self.model.dtype
        self.model.save_pretrained(self.folder)
        loaded = type(self.model).from_pretrained(self.folder, dtype=dtype)
        assert torch.equal(output(loaded, self.name), output(self.model, self.name))
        if self.random.random() < 0.5:
            return None
        self.state = "packed"
        return loaded

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def pickle(self) -> nn.Module:
        return pickle.loads(pickle.dumps(self.model))

    def cast(self) -> nn.Module | None:
        if self.name in NOT_CAST:
            return None
        return self.model.to(torch.float32 if self.model.dtype == torch.bfloat16 else torch.bfloat16)

    def move(self) -> nn.Module:
        return self.model.to("cpu")

    def report(self) -> None:
        assert "quantized" in str(get_quantization_info(self.model))

    def state_dict(self) -> None:
        self.model.load_state_dict({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def step(self) -> None:
        self.model.train()
        batch = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in TINY[self.name].inputs().items()}
        out = self.model(**batch)
        found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
        found.float().square().mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.sign() * parameter.abs().mean().clamp(min=1e-3)
                    parameter.grad = None
        self.model.eval()

    def merge(self) -> nn.Module:
        return merge_adapters(self.model)

    def convert(self) -> nn.Module:
        return convert_model_qat(self.model)


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_what_can_be_done(seed: int, tmp_path: Path) -> None:
    life = Life(seed, tmp_path)
    try:
        for _ in range(12):
            life.go_on()
    except Exception as error:
        error.add_note(f"after {life.done}")
        raise

"""LoRA on models that bitsandbytes quantized: gradients, Trainer and QuantTrainer, evaluations in between."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hfquant import QuantTrainer, dequantize_model, get_quantization_info, quantize_model_ptq
from hfquant.hf.bitsandbytes import bitsandbytes_layers
from hfquant.hf.peft import add_side_adapter
from tests.support.adapters import adapter_state, randomize_
from tests.support.tiny_models import llama, output
from tests.support.tolerance import GRADIENT_FACTOR, assert_close
from tests.support.training import config, examples


pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*_check_is_size"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

BITS = {"int8": 8, "nf4": 4}


def quantized(scheme: str) -> Any:
    torch.manual_seed(0)
    model = llama(intermediate_size=128).eval()
    return quantize_model_ptq(model, backend="bitsandbytes", quantization_bits=BITS[scheme], progress=False)


@pytest.mark.parametrize("scheme", BITS)
def test_gradients_of_an_adapter_are_those_beside_the_dense_weight(scheme: str) -> None:
    """``x``, ``A`` and ``B`` of every layer, fresh and after an evaluation, straight through LLM.int8's rounding."""
    weights = dict(dequantize_model(quantized(scheme)).named_parameters())
    model = randomize_(get_peft_model(quantized(scheme), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    names = {name.removesuffix(".base_layer") for name, _ in bitsandbytes_layers(model) if "base_layer" in name}
    assert len(names) == 4
    for _ in range(2):
        for name in names:
            layer = model.get_submodule(name)
            x, upstream = torch.randn(3, layer.in_features), torch.randn(3, layer.out_features)
            inner = x.clone().requires_grad_()
            model.zero_grad()
            layer(inner).backward(upstream)
            weight = weights[name.removeprefix("base_model.model.") + ".weight"]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            exact, plain = (beside(x, upstream, weight, a, b, 2.0, dtype) for dtype in (torch.float64, torch.float32))
            for found, oracle, same in zip((inner.grad, a.grad, b.grad), exact, plain, strict=True):
                assert_close(found, oracle, same, factor=GRADIENT_FACTOR)
        output(model.eval(), "llama")
        model.train()


def beside(
    x: Tensor, upstream: Tensor, weight: Tensor, a: Tensor, b: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of ``x``, ``A`` and ``B`` by autograd of ``x W' + factor x A' B'`` in ``dtype``."""
    x, weight, a, b = (t.detach().to(dtype) for t in (x, weight, a, b))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    out = x @ weight.t() + factor * (x @ a.t()) @ b.t()
    return torch.autograd.grad(out, leaves, upstream.to(dtype))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("scheme", BITS)
def test_trainer_and_quant_trainer_train_the_same_adapter(scheme: str, tmp_path: Path) -> None:
    """With evaluations in between, which must cost no gradient; both save the adapter alone."""
    options = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
    states = []
    for kind in (Trainer, QuantTrainer):
        torch.manual_seed(0)
        model = quantized(scheme)
        if kind is Trainer:
            args: Any = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2}
            args = TrainingArguments(output_dir=str(tmp_path / "plain"), save_strategy="no", **args | options)
            model = add_side_adapter(model, rank=4)
        else:
            fields = {"enable_quantized_finetuning": True, "adapter": "side", "adapter_rank": 4}
            args = config(tmp_path / "quant", **fields | options)
        trainer = kind(model=model, args=args, train_dataset=examples(), eval_dataset=examples(4))
        trainer.train()
        found = trainer.accelerator.unwrap_model(trainer.model)
        assert isinstance(found, PeftModel)
        assert losses(trainer)[-1] < losses(trainer)[0]
        states.append((losses(trainer), adapter_state(found)))
        assert all(bool(value.any()) for value in adapter_state(found).values())
        trainer.save_model(str(tmp_path / f"{kind.__name__}-adapter"))
        loaded = PeftModel.from_pretrained(quantized(scheme), tmp_path / f"{kind.__name__}-adapter")
        assert torch.equal(output(loaded, "llama"), output(found.eval(), "llama"))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())
    assert get_quantization_info(loaded.base_model.model).is_quantized

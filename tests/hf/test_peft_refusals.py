"""Adapters that would take integer codes for weights are refused before anything is changed."""

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from hfquant import ConfigError, prepare_model_for_finetuning
from tests.support.adapters import codes, quantized, same
from tests.support.tiny_models import output, text_inputs


METHODS: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 4, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "IA3": {"feedforward_modules": []},
    "Vera": {},
    "LoHa": {},
    "LoKr": {},
    "AdaLora": {"total_step": 10},
    "HRA": {},
    "FourierFT": {},
    "RandLora": {},
    "Miss": {},
    "Shira": {},
    "Road": {},
    "C3A": {"block_size": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_on_packed_layers_are_refused(method: str) -> None:
    config = getattr(peft, f"{method}Config")(target_modules=["q_proj"], **METHODS[method])
    model = quantized()
    before, expected = codes(model), output(model, "llama")
    with pytest.raises(ConfigError, match=rf"(?i){method} on model\.layers\.0\.self_attn\.q_proj.*Use LoraConfig"):
        get_peft_model(model, config)
    assert same(codes(model), before)
    assert torch.equal(output(model, "llama"), expected)
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_other_methods_by_their_default_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"IA3 on model\.layers\.0\.self_attn\.k_proj"):
        get_peft_model(quantized(), peft.IA3Config(task_type="CAUSAL_LM"))


def test_other_methods_on_float_layers_work() -> None:
    model = quantized(skip_modules=["*q_proj"])
    adapted = get_peft_model(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert torch.equal(output(adapted, "llama"), output(adapted.unload(), "llama"))


def test_methods_that_touch_no_weight_work() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = get_peft_model(quantized(), config)
    ids = text_inputs()["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' computes with the base weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            "alora_invocation_tokens: LoRA on hfquant's packed layers knows no variant",
        ),
    ],
)
def test_variants_of_lora_that_read_the_weight_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(quantized(), LoraConfig(target_modules=["q_proj"], **fields))


def test_embeddings_refuse_what_reads_their_codes() -> None:
    with pytest.raises(ConfigError, match=r"use_dora on model\.embed_tokens"):
        get_peft_model(quantized(embedding_bits=8), LoraConfig(target_modules=["embed_tokens"], use_dora=True))
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(ConfigError, match=r"trainable_token_indices: model\.embed_tokens is packed"):
        get_peft_model(quantized(embedding_bits=8), config)


def test_a_model_in_fine_tuning_takes_no_second_adapter() -> None:
    model = prepare_model_for_finetuning(quantized(), "grid", rank=2, progress=False)
    with pytest.raises(ConfigError, match=r"q_proj is in fine-tuning with another adapter; call merge_adapters"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mlp\.experts\.gate_up_proj: packed experts take no PEFT adapter"):
        get_peft_model(quantized("mixtral"), LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]))
    with pytest.raises(ConfigError, match=r"LoRA on model\.layers\.0\.mlp\.experts: packed experts"):
        get_peft_model(quantized("mixtral"), LoraConfig(target_modules=["experts"]))
    adapted = get_peft_model(quantized("mixtral"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = text_inputs()["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)

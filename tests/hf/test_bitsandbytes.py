"""The bitsandbytes backend: same calls, bitsandbytes' own checkpoints, gradients that are right after an evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hfquant import ConfigError, HfQuantConfig, dequantize_model, get_quantization_info, quantize_model_ptq
from hfquant.hf.bitsandbytes import bitsandbytes_layers, keep_exact_
from tests.support.processes import BLOCKED, compare_in_new_process
from tests.support.tiny_models import llama, output, text_inputs
from tests.support.tolerance import GRADIENT_FACTOR, assert_close


pytest.importorskip("bitsandbytes")

SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"quantization_bits": 8},
    "nf4": {"quantization_bits": 4},
    "nf4-double": {"quantization_bits": 4, "bnb_4bit_use_double_quant": True},
    "fp4": {"quantization_bits": 4, "bnb_4bit_quant_type": "fp4"},
}
PLAIN = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*_check_is_size"),
    # PEFT 0.21 asks Transformers 5.23 by the old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


EXACT = "import bitsandbytes.nn.modules as b; b.has_avx512bf16 = lambda: False\n"
"""For processes that compare bits: no repacking for AVX512-BF16, which rounds scales in the first evaluation."""


def wide() -> PreTrainedModel:
    """Every layer has a multiple of 64 inputs: bitsandbytes' own CPU kernels fail on others."""
    torch.manual_seed(0)
    model = llama(intermediate_size=128).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def quantized(scheme: str) -> PreTrainedModel:
    return quantize_model_ptq(wide(), backend="bitsandbytes", progress=False, **SCHEMES[scheme])


def test_saved_models_load_in_plain_transformers_with_the_same_logits(tmp_path: Path) -> None:
    saved = []
    wide().save_pretrained(tmp_path / "float")
    for scheme, fields in SCHEMES.items():
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=HfQuantConfig(backend="bitsandbytes", **fields)
        )
        for name, model in (("memory", quantized(scheme)), ("loaded", loaded)):
            folder = tmp_path / f"{scheme}-{name}"
            model.save_pretrained(folder)
            save_file({"output": output(model, "llama")}, folder / "expected.st")
            saved.append([str(folder), "llama", "LlamaForCausalLM"])
    assert compare_in_new_process(saved, prefix=BLOCKED + EXACT, HFQUANT_AUTOLOAD="0") == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_models_of_plain_transformers_are_understood(scheme: str, tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=PLAIN[scheme])
    own = quantized(scheme)
    infos = [get_quantization_info(m) for m in (model, own)]
    assert infos[0].to_dict() == infos[1].to_dict()
    assert len(infos[0].quantized) == 14
    kinds = {"int8": "llm.int8-channel", "nf4": "nf4-g64", "nf4-double": "nf4-g64-double", "fp4": "fp4-g64"}
    assert infos[0].quantized[0].scheme == kinds[scheme]
    assert infos[0].quantization_bits == SCHEMES[scheme]["quantization_bits"]
    assert "bitsandbytes keeps it" in str(infos[0])
    before = output(keep_exact_(model), "llama")
    floats = [dequantize_model(m) for m in (model, own)]
    assert type(floats[0].model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not get_quantization_info(floats[0]).is_quantized
    assert torch.equal(output(floats[0], "llama"), output(floats[1], "llama"))
    assert torch.nn.functional.mse_loss(output(floats[0], "llama"), before) < before.square().mean() * 0.01
    floats[0].save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(output(again, "llama"), output(floats[0], "llama"))


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "evaluated-before"])
@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "fp4"])
def test_gradients_are_those_of_the_dense_weights(scheme: str, evaluated: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0)
    gradients = []
    for dense in (False, True, None):
        model = quantized(scheme)
        if evaluated:
            output(model, "llama")
        if dense is not False:
            model = dequantize_model(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        if evaluated:
            output(model.eval(), "llama")
        model = model.double() if dense is None else model
        inputs = model.get_input_embeddings()(text_inputs()["input_ids"]).detach().requires_grad_()
        loss = model.train()(inputs_embeds=inputs, labels=text_inputs()["input_ids"]).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        gradients.append(found | {"inputs": inputs.grad})
    packed, plain, oracle = gradients
    assert len(packed) == 9
    for name, gradient in packed.items():
        assert gradient is not None, name
        assert_close(gradient, oracle[name].double(), plain[name], factor=GRADIENT_FACTOR)


def test_int8_gradients_pass_straight_through_to_the_dense_weight() -> None:
    model = quantized("int8")
    weights = dict(dequantize_model(quantized("int8")).named_parameters())
    for evaluated in (False, True):
        for name, layer in bitsandbytes_layers(model):
            x = torch.randn(3, layer.in_features, requires_grad=True)
            out = layer(x)
            grad = torch.randn_like(out)
            out.backward(grad)
            weight = weights[f"{name}.weight"]
            assert_close(x.grad, grad.double() @ weight.double(), grad @ weight, factor=GRADIENT_FACTOR)
        if not evaluated:
            output(model.eval(), "llama")
            model.train()


def test_models_of_plain_transformers_train_after_an_evaluation(tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=PLAIN["nf4"])
    keep_exact_(keep_exact_(model))
    output(model.eval(), "llama")
    inputs = model.get_input_embeddings()(text_inputs()["input_ids"]).detach().requires_grad_()
    model.train()(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None
    assert bool(inputs.grad.any())


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "static": ({"quantization_bits": 8, "quantization_type": "static"}, "quantization_type='static'"),
    "int8-weight-only": ({"quantization_bits": 8, "quantization_type": "weight_only"}, "'dynamic' only"),
    "int4-dynamic": ({"quantization_bits": 4, "quantization_type": "dynamic"}, "'weight_only' only"),
    "groups": ({"quantization_bits": 4, "group_size": 32}, "group_size=32: .* takes 64"),
    "asymmetric": ({"symmetric": False}, "has no zero points"),
    "algorithm": ({"algorithm": "search"}, "rule of its own"),
    "embeddings": ({"embedding_bits": 8}, "keeps embeddings"),
    "overrides": ({"overrides": {"mlp": {"quantization_bits": 4}}}, "one scheme"),
    "globs": ({"skip_modules": ["model.*.mlp"]}, "no globs"),
    "calibration": ({"calibration_data": [text_inputs()]}, "does not calibrate"),
    "fp4-with-8-bits": ({"quantization_bits": 8, "bnb_4bit_quant_type": "fp4"}, "quantization_bits=4"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_it_cannot_do_is_refused(case: str) -> None:
    fields, message = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=message):
        quantize_model_ptq(wide(), backend="bitsandbytes", progress=False, **fields)


def test_other_models_and_fields_without_the_backend_are_refused() -> None:
    with pytest.raises(ConfigError, match="Transformers models, not a Linear"):
        quantize_model_ptq(torch.nn.Linear(64, 64), backend="bitsandbytes", progress=False)
    with pytest.raises(ConfigError, match="is for backend='bitsandbytes'"):
        HfQuantConfig(quantization_bits=4, bnb_4bit_quant_type="nf4")


def test_skipped_modules_stay_float() -> None:
    model = quantize_model_ptq(
        wide(), backend="bitsandbytes", quantization_bits=4, skip_modules=["up_proj"], progress=False
    )
    names = {name for name, _ in bitsandbytes_layers(model)}
    assert len(names) == 12
    assert not any("up_proj" in name or "lm_head" in name for name in names)

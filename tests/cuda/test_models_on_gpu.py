"""Whole models on an NVIDIA GPU: quantize, save, load, run, train, merge. Skipped where there is none."""

import copy
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant import (
    QuantTrainer,
    convert_model_qat,
    dequantize_model,
    get_quantization_info,
    merge_adapters,
    prepare_model_for_finetuning,
    prepare_model_qat,
    quantize_model_ptq,
)
from hfquant.hf.rounding import round_anew, set_rounding
from hfquant.nn.swap import packed_modules
from hfquant.numerics.metrics import sqnr_db
from hfquant.qat.prepare import fake_quant_modules
from tests.support.tiny_models import TINY, build
from tests.support.tolerance import NATIVE_SQNR_DB, SAME_VALUES
from tests.support.training import config, examples


pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # What has no kernel for a GPU says so once, and a machine for GPUs may have no compiler for the CPU's.
    pytest.mark.filterwarnings("ignore:hfquant:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

ARCHITECTURES = ["llama-tied", "gpt2", "mixtral", "gpt-oss", "bert", "bart", "gemma3"]
ALGORITHMS = ["rtn", "search", "gptq", "signround", "awq"]
TYPES = [(8, "weight_only"), (8, "dynamic"), (8, "static"), (4, "weight_only"), (4, "dynamic")]


def batch(name: str) -> dict[str, Tensor]:
    return {key: value.cuda() for key, value in TINY[name].inputs().items()}


def outputs(model: nn.Module, name: str) -> Tensor:
    out = model(**batch(name))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def all_codes(modules: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": m.packed(key).weight.cpu() for name, m in modules for key in m.float_weights}


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return all_codes(packed_modules(model))


def quantized(name: str, **options: Any) -> PreTrainedModel:
    static = options.get("quantization_type") == "static" or options.get("algorithm") in ("gptq", "signround", "awq")
    data = [TINY[name].inputs()] if static else None
    return quantize_model_ptq(build(name).cuda(), calibration_data=data, progress=False, **options)


def train_(model: nn.Module, name: str, steps: int = 3) -> list[float]:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3), []
    target = torch.randn(outputs(model, name).shape, generator=torch.Generator().manual_seed(3)).cuda()
    for _ in range(steps):
        loss = (outputs(model, name) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms(algorithm: str) -> None:
    model = quantized("llama-tied", quantization_bits=4, algorithm=algorithm, iterations=3)
    assert all(value.is_cuda for value in model.state_dict().values())
    with torch.no_grad():
        found = outputs(model, "llama-tied")
        dense = dequantize_model(copy.deepcopy(model))
        assert next(dense.parameters()).is_cuda
        assert sqnr_db(outputs(dense, "llama-tied"), found) >= NATIVE_SQNR_DB


def test_codes_are_those_of_a_cpu() -> None:
    for bits in (4, 8):
        options = {"quantization_bits": bits, "algorithm": "rtn", "progress": False}
        here, there = (
            quantize_model_ptq(build("llama-tied"), **options),
            quantize_model_ptq(build("llama-tied").cuda(), **options),
        )
        assert all(torch.equal(codes, codes_of(here)[name]) for name, codes in codes_of(there).items())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "kind"), TYPES, ids=str)
def test_saved_and_loaded(name: str, bits: int, kind: str, tmp_path: Path) -> None:
    model = quantized(name, quantization_bits=bits, quantization_type=kind)
    with torch.no_grad():
        before = outputs(model, name)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, device_map="cuda")
        assert all(value.is_cuda for value in loaded.state_dict().values())
        assert torch.equal(outputs(loaded.eval(), name), before)
        host = type(model).from_pretrained(tmp_path).eval()
        out = host(**TINY[name].inputs())
        out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    # Integer activations may round to the other side of a tie; weights alone are the same numbers.
    assert sqnr_db(out, before.cpu()) >= (NATIVE_SQNR_DB if kind == "weight_only" else 25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "kind"), TYPES, ids=str)
def test_half_precision_generates(bits: int, kind: str, dtype: torch.dtype) -> None:
    model = build("llama-tied").to(dtype).cuda()
    data = [TINY["llama-tied"].inputs()] if kind == "static" else None
    quantize_model_ptq(model, quantization_bits=bits, quantization_type=kind, calibration_data=data, progress=False)
    ids = batch("llama-tied")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
        found = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_is_eager(bits: int) -> None:
    model = quantized("llama-tied", quantization_bits=bits).to(torch.bfloat16)
    ids = batch("llama-tied")["input_ids"]
    with torch.no_grad():
        eager = model(ids).logits
        compiled = torch.compile(model, fullgraph=True)(ids).logits
    assert sqnr_db(eager, compiled) >= 30


@pytest.mark.parametrize("variant", ["full", "lora"])
@pytest.mark.parametrize(("bits", "kind"), TYPES, ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_trained_is_converted(name: str, bits: int, kind: str, variant: str, tmp_path: Path) -> None:
    data = [TINY[name].inputs()] if kind == "static" else None
    options = {"quantization_bits": bits, "quantization_type": kind, "variant": variant, "progress": False}
    model = prepare_model_qat(build(name).cuda(), calibration_data=data, **options)
    losses = train_(model, name)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        before = outputs(model, name)
        trained = all_codes(fake_quant_modules(model))
        convert_model_qat(model)
        found = codes_of(model)
        assert all(torch.equal(codes, found[key]) for key, codes in trained.items())
        assert sqnr_db(before, outputs(model, name)) >= (NATIVE_SQNR_DB if kind == "weight_only" else 25)
        model.save_pretrained(tmp_path)
        assert all(torch.equal(c, found[k]) for k, c in codes_of(type(model).from_pretrained(tmp_path)).items())


@pytest.mark.parametrize("adapter", ["grid", "grid-delay", "scales", "side"])
@pytest.mark.parametrize(("bits", "kind"), TYPES, ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_finetuned_and_merged(name: str, bits: int, kind: str, adapter: str, tmp_path: Path) -> None:
    if (name, adapter) == ("mixtral", "side"):
        pytest.skip("PEFT has no adapters on packed experts")
    model = quantized(name, quantization_bits=bits, quantization_type=kind)
    model = prepare_model_for_finetuning(model, adapter.removesuffix("-delay"), rank=4, progress=False)
    if adapter == "grid-delay":
        set_rounding(model, False)
    losses = train_(model, name)
    assert losses[-1] < losses[0]
    if adapter == "grid-delay":
        round_anew(model, [TINY[name].inputs()], progress=False)
        train_(model, name)
    model.eval()
    with torch.no_grad():
        before = outputs(model, name)
        merged = merge_adapters(model)
        after = outputs(merged, name)
    if adapter != "side":  # which rounds again
        assert sqnr_db(before, after) >= (NATIVE_SQNR_DB if kind == "weight_only" else 25)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path, device_map="cuda").eval()
    with torch.no_grad():
        assert torch.equal(outputs(loaded, name), after)
    assert get_quantization_info(loaded).is_quantized


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_mode": "qat", "quantization_bits": 4, "quantization_type": "weight_only"},
        {"quantization_mode": "qat", "quantization_bits": 8, "quantization_type": "dynamic"},
        {"enable_quantized_finetuning": True, "adapter": "grid"},
        {"enable_quantized_finetuning": True, "adapter": "grid", "adapter_delay_steps": 1},
        {"enable_quantized_finetuning": True, "adapter": "scales"},
        {"enable_quantized_finetuning": True, "adapter": "side"},
    ],
    ids=str,
)
@pytest.mark.parametrize("half", [False, True])
def test_trainer(options: dict[str, Any], half: bool, tmp_path: Path) -> None:
    def made(folder: str) -> QuantTrainer:
        model = build("llama-tied") if "quantization_mode" in options else quantized("llama-tied", quantization_bits=4)
        given = {"use_cpu": False, "bf16": half, "save_strategy": "steps", "save_steps": 2} | options
        return QuantTrainer(model=model, args=config(tmp_path / folder, **given), train_dataset=examples())

    trainer = made("a")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    if options.get("adapter") != "side":  # which saves the adapter alone, as PEFT does
        loaded = type(build("llama-tied")).from_pretrained(tmp_path / "final", device_map="cuda")
        assert next(loaded.parameters()).is_cuda
    again = made("b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    mine, theirs = trainer.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys()
    # Sums by atomics, as in the gradient of an embedding, come out in another order now and then.
    assert all(torch.allclose(value.float(), theirs[key].float(), **SAME_VALUES) for key, value in mine.items())


def test_memory_of_a_packed_model() -> None:
    """A loaded INT4 model takes what its file takes, and a forward pass makes no dense copy."""
    options = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 512}
    from tests.support.tiny_models import llama

    model = llama(**options).to(torch.bfloat16).cuda()
    dense = sum(p.numel() * 2 for p in model.parameters())
    quantize_model_ptq(model, quantization_bits=4, progress=False)
    gc.collect()
    torch.cuda.empty_cache()
    held = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    assert held < 0.32 * dense
    with torch.no_grad():
        model(torch.arange(3, 35, device="cuda").unsqueeze(0))
    assert torch.cuda.max_memory_allocated() - start < 0.3 * dense

"""Bits by budget: the solver against brute force, the sensitivity against the divergence, whole models."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant import (
    ConfigError,
    HfQuantConfig,
    export_model,
    get_quantization_info,
    prepare_model_qat,
    quantize_model_ptq,
)
from hfquant.evaluation.compare import compare_models
from hfquant.formats.headers import DTYPE_BYTES, read_header
from hfquant.formats.resume import ResumeFolder
from hfquant.nn.select import packed_class
from hfquant.nn.swap import packed_modules
from hfquant.ptq import allocate
from hfquant.ptq.allocate import Option, matrix_error, solve, solve_for_error
from hfquant.ptq.sensitivity import measure_sensitivity
from hfquant.schemes import WeightScheme
from tests.support.tiny_models import TINY, build, output


INT4 = WeightScheme(4, 32)


def random_options(seed: int) -> list[list[Option]]:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    return [
        [Option(INT4, 8 * number(1, 30), float(torch.rand(1, generator=generator))) for _ in range(number(1, 5))]
        for _ in range(number(1, 6))
    ]


def best_of(options: list[list[Option]], capacity: float, bound: float = float("inf")) -> tuple[int, float]:
    totals = [(sum(o.bytes for o in c), sum(o.error for o in c)) for c in itertools.product(*options)]
    fitting = [total for total in totals if total[0] <= capacity and total[1] <= bound]
    return min(fitting, key=lambda t: t[1] if bound == float("inf") else t[0])


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    options = random_options(seed)
    least, most = (sum(pick(o.bytes for o in unit) for unit in options) for pick in (min, max))
    for capacity in {least, (least + most) // 2, most, 2 * most}:
        chosen = solve(options, capacity)
        assert sum(o.bytes for o in chosen) <= capacity
        assert sum(o.error for o in chosen) == pytest.approx(best_of(options, capacity)[1], rel=1e-12)
        assert all(option in unit for option, unit in zip(chosen, options, strict=True))
    with pytest.raises(ConfigError, match="at least"):
        solve(options, least - 1)
    lowest = sum(min(o.error for o in unit) for unit in options)
    for bound in (lowest * 1.0001, lowest * 1.5 + 0.1):
        chosen = solve_for_error(options, bound)
        assert sum(o.error for o in chosen) <= bound * (1 + 1e-12)
        assert sum(o.bytes for o in chosen) == best_of(options, most, bound)[0]


def test_a_coarse_programme_keeps_the_budget_and_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [unit for seed in range(12) for unit in random_options(seed)]
    least, most = (sum(pick(o.bytes for o in unit) for unit in options) for pick in (min, max))
    capacity = (least + most) // 2
    exact = sum(o.error for o in solve(options, capacity))
    monkeypatch.setattr(allocate, "CELLS", 100)
    coarse = solve(options, capacity)
    assert sum(o.bytes for o in coarse) <= capacity
    assert exact <= sum(o.error for o in coarse) <= 1.2 * exact + 0.1


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_the_sensitivity_foretells_the_divergence(layer: str) -> None:
    torch.manual_seed(0)
    model, original = build("llama"), build("llama")
    batches = [{"input_ids": torch.randint(3, 120, (4, 32))} for _ in range(8)]
    module = model.get_submodule(layer)
    weights = packed_class(module).weights_of(module)
    measured = measure_sensitivity(model, {f"{layer}.weight": weights["weight"]}, batches, seed=0, progress=False)
    assert measured.kind == "kl"
    scheme = WeightScheme(4, 32)
    expected = matrix_error(module.weight, scheme, measured.factors[f"{layer}.weight"], layer)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(before.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    names = [name for name, m in model.named_modules() if packed_class(m) is not None and name != layer]
    quantize_model_ptq(
        model, quantization_bits=4, group_size=32, algorithm="search", skip_modules=names, progress=False
    )
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    found = compare_models(original, {"q": model}, ids, context=32, progress=False)["q"].mean_kl
    assert 0.6 * found < expected < 1.6 * found


def data(name: str) -> list[Any]:
    return [TINY[name].inputs()] * 2


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "data-free"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "qwen3-moe"])
def test_the_average_is_kept_and_the_checkpoint_is_an_ordinary_one(name: str, calibrated: bool, tmp_path: Path) -> None:
    model = build(name)
    fields = {"calibration_data": data(name)} if calibrated else {}
    quantize_model_ptq(model, target_bits=5.4, progress=False, **fields)
    info, config = get_quantization_info(model), model.config.quantization_config
    tables = {q.tied_to for q in info.quantized} | {q.name for q in info.quantized if q.tied_to or "emb" in q.name}
    others = ("wte", "head", *(["pooler"] if calibrated else []))
    chosen = [q for q in info.quantized if q.name not in tables and not any(part in q.name for part in others)]
    bits = 8 * sum(q.bytes_after for q in chosen) / sum(q.numel for q in chosen)
    assert 4.9 < bits <= 5.4
    assert config.allocation["bits"] == pytest.approx(bits)
    kinds = {("bert", True): "relative error"}
    assert config.allocation["kind"] == kinds.get((name, calibrated), "kl" if calibrated else "weights")
    assert len({q.scheme for q in chosen}) > 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again, name), output(model, name))
    assert again.config.quantization_config.allocation == config.allocation
    assert again.config.quantization_config.target_bits == 5.4


def test_a_size_is_kept_and_used(tmp_path: Path) -> None:
    model = build("llama")
    quantize_model_ptq(model, target_size="60KB", calibration_data=data("llama"), progress=False)
    model.save_pretrained(tmp_path)
    tensors = read_header(tmp_path / "model.safetensors").tensors.values()
    stored = sum(DTYPE_BYTES[t.dtype] * torch.Size(t.shape).numel() for t in tensors)
    assert 58_000 < stored <= 60_000


def test_an_error_is_kept_with_fewer_bytes_than_a_smaller_one_takes() -> None:
    sizes = []
    for bound in (0.0005, 0.002):
        model = build("llama")
        quantize_model_ptq(model, target_error=bound, calibration_data=data("llama"), progress=False)
        allocation = model.config.quantization_config.allocation
        assert allocation["error"] <= bound
        sizes.append(allocation["bytes"])
    assert sizes[1] < sizes[0]


def test_layers_that_engines_fuse_stay_together_and_settled_ones_are_left_alone() -> None:
    model = build("llama")
    overrides = {"layers.0.mlp.down_proj": {"group_size": 16}, "layers.1.mlp.down_proj": {"quantization_bits": 8}}
    quantize_model_ptq(model, target_bits=5.5, overrides=overrides, calibration_data=data("llama"), progress=False)
    modules = model.config.quantization_config.modules
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({modules[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({modules[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    assert modules["model.layers.0.mlp.down_proj"] == "int4-g16"
    assert modules["model.layers.1.mlp.down_proj"] == "int8-channel"


def test_the_mixture_can_be_served(tmp_path: Path) -> None:
    model = build("llama")
    fields = {"target_bits": 5.2, "embedding_bits": 16, "calibration_data": data("llama")}
    quantize_model_ptq(model, progress=False, **fields)
    report = export_model(model, "compressed-tensors", tmp_path / "x", engine="vllm", progress=False)
    assert len(set(report.schemes.values())) > 1


def test_a_group_that_was_asked_for_is_the_only_one() -> None:
    model = build("llama")
    quantize_model_ptq(model, target_bits=6, group_size=16, progress=False)
    schemes = set(model.config.quantization_config.modules.values()) - {"int8-channel"}
    assert schemes == {"int4-g16", "int8-g16"}


def test_a_layer_that_the_output_does_not_depend_on_keeps_its_scheme() -> None:
    model, fields = build("bert"), {"quantization_bits": 8, "quantization_type": "weight_only"}
    quantize_model_ptq(model, target_bits=5.4, calibration_data=data("bert"), progress=False, **fields)
    assert str(model.pooler.dense.scheme) == "int8-channel"  # the pooler is not what is measured
    assert any(str(m.scheme).startswith("int4") for _, m in packed_modules(model))


def test_an_interrupted_run_does_not_choose_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for _ in range(2):
        model = build("llama")
        store = ResumeFolder(tmp_path / "run", "x")
        quantize_model_ptq(model, target_bits=5.5, calibration_data=data("llama"), resume=store, progress=False)
        states.append((model.config.quantization_config.to_dict(), model.state_dict()))
        monkeypatch.setattr("hfquant.hf.allocation.allocate_", None)
    assert states[0][0] == states[1][0]
    assert all(torch.equal(tensor, states[1][1][name]) for name, tensor in states[0][1].items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bits": 3}, r"target_bits=3: with their scales the layers take 4\.\d+ to 8\.\d+ bits"),
        ({"target_size": 1000}, r"target_size=1000: the model takes \d+ to \d+ bytes"),
        ({"target_error": 1e-12}, r"target_error=1e-12: the estimated error is at least"),
        ({"target_bits": "4.5"}, "target_bits='4.5': expected a number above 0"),
        ({"target_size": "much"}, "target_size='much': expected a size"),
        ({"target_bits": 4.5, "target_size": 100}, "target_bits and target_size: give one"),
        ({"target_bits": True}, "target_bits=True"),
        ({"target_bits": 4.5, "backend": "bitsandbytes"}, "target_bits and backend"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_says_what_can(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_model_ptq(build("llama"), progress=False, **fields)


def test_where_there_is_no_whole_model_it_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="call quantize_model_ptq"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig(target_bits=4.5))
    with pytest.raises(ConfigError, match="give overrides here"):
        prepare_model_qat(build("llama"), target_bits=4.5)

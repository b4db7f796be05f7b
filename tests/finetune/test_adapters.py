"""Fine-tuning on packed weights: what trains, what it becomes, and that merging changes nothing."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hfquant import (
    ConfigError,
    FormatError,
    SchemeError,
    dequantize_model,
    get_quantization_info,
    load_quantized,
    merge_adapters,
    prepare_model_for_finetuning,
    quantize_model_ptq,
    save_quantized,
)
from hfquant.finetune.adapted import adapted_modules, movement, training_tensors
from hfquant.formats.native import SAVE_ID_KEY
from hfquant.hf.source import open_source
from hfquant.kernels import native
from hfquant.nn.swap import packed_modules
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.metrics import sqnr_db
from hfquant.numerics.packing import unpack
from tests.support.finetune import SCHEMES, finetuned, packed_model, train_
from tests.support.tiny_models import TEXT, build, output
from tests.support.tolerance import NATIVE_SQNR_DB


pytestmark = pytest.mark.usefixtures("reference_kernels")


def codes_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": m.packed(key).weight for name, m in packed_modules(model) for key in m.float_weights}


def folder_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("adapter", ["grid", "scales"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_merging_and_saving_change_nothing(scheme: str, adapter: str, tmp_path: Path) -> None:
    for name in ("llama-tied", "gpt2", "mixtral"):
        packed_model(name, scheme).save_pretrained(tmp_path / name / "before")
        model = finetuned(name, scheme, adapter)
        expected, codes = output(model, name), codes_of(model)
        model.save_pretrained(tmp_path / name / "after")
        reloaded = type(model).from_pretrained(tmp_path / name / "after")
        assert all(torch.equal(found, codes[key]) for key, found in codes_of(reloaded).items())
        assert torch.equal(output(reloaded, name), expected)
        assert torch.equal(output(model, name), expected)  # it trains on
        before, after = (folder_bytes(tmp_path / name / which) for which in ("before", "after"))
        assert abs(after - before) <= 0.01 * before
        merge_adapters(model)
        assert all(torch.equal(found, codes[key]) for key, found in codes_of(model).items())
        assert torch.equal(output(model, name), expected)
        assert next(adapted_modules(model), None) is None
        model.save_pretrained(tmp_path / name / "merged")
        ids = {
            json.loads((tmp_path / name / which / "config.json").read_text())["quantization_config"]["save_id"]
            for which in ("after", "merged")
        }
        assert len(ids) == 1  # the sha256 of everything
        half = type(model).from_pretrained(tmp_path / name / "merged").to(torch.bfloat16)
        assert torch.equal(output(model.to(torch.bfloat16), name), output(half, name))


@pytest.mark.parametrize("name", ["gpt-oss", "llama4", "bert", "gemma3", "bart", "vit", "falcon"])
def test_other_models_fine_tune(name: str, tmp_path: Path) -> None:
    model = finetuned(name, "int4", "grid")
    moved = movement(model)
    assert moved.codes_moved > 0
    assert moved.scales_moved > moved.scales // 2
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path), name), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_starts_where_ptq_ended(scheme: str) -> None:
    for adapter in ("grid", "scales"):
        model = packed_model("llama-tied", scheme)
        before = output(model, "llama-tied")
        prepare_model_for_finetuning(model, adapter, rank=4, progress=False)
        assert torch.equal(output(model, "llama-tied"), before)
        assert movement(model).codes_moved == movement(model).scales_moved == 0


def test_grid_moves_codes_and_scales_and_scales_moves_scales_norms_and_biases() -> None:
    for adapter in ("grid", "scales"):
        model = packed_model("gpt2")
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        prepare_model_for_finetuning(model, adapter, rank=4, progress=False)
        train_(model, "gpt2")
        moved = movement(model)
        assert (moved.codes_moved > 0) == (adapter == "grid")
        assert moved.scales_moved > 0.9 * moved.scales
        changed = {name for name, p in start.items() if not torch.equal(p, model.get_parameter(name))}
        vectors = {name for name, p in start.items() if p.is_floating_point() and p.ndim == 1}
        assert changed == (set() if adapter == "grid" else vectors)


def test_the_report_says_what_moved_and_what_training_takes(tmp_path: Path) -> None:
    model = packed_model("llama", "int4")
    size = get_quantization_info(model).bytes_after
    prepare_model_for_finetuning(model, rank=4, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train_(model, "llama")
    info = get_quantization_info(model, optimizer)
    found = info.finetuning
    assert info.is_quantized
    assert info.bytes_after == size
    assert found.residual == "dither"
    assert 0 < found.codes_moved < found.codes
    assert found.optimizer_bytes == 0
    assert found.weight_bytes == sum(t.nbytes for n, t in training_tensors(model).items() if not t.is_floating_point())
    assert f"{found.codes_moved} of {found.codes} codes" in str(info)
    assert "bytes a weight" in str(info)
    model.save_pretrained(tmp_path)
    saved = get_quantization_info(type(model).from_pretrained(tmp_path))
    assert saved.bytes_after == size
    assert (saved.finetuning.codes_moved, saved.finetuning.scales_moved) == (found.codes_moved, found.scales_moved)
    assert saved.finetuning.weight_bytes == 0


@pytest.mark.parametrize(("bits", "limit"), [(4, 1.07), (8, 1.57)])
def test_grid_holds_this_many_bytes_a_weight(bits: int, limit: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 256, bias=False))
    quantize_model_ptq(model, quantization_bits=bits, quantization_type="weight_only", group_size=64, progress=False)
    prepare_model_for_finetuning(model, rank=4, progress=False)
    found = get_quantization_info(model).finetuning
    assert found.weight_bytes / found.codes <= limit
    assert found.learned_scale_bytes / found.codes == 4 / 64
    assert found.adapter_bytes == 4 * 4 * (1024 + 256)


def test_scales_and_their_optimizer_hold_this_many_bytes_a_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 256, bias=False))
    quantize_model_ptq(model, quantization_bits=4, group_size=64, progress=False)
    prepare_model_for_finetuning(model, "scales", progress=False)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains)
    model(torch.randn(3, 1024)).square().sum().backward()
    optimizer.step()
    found = get_quantization_info(model, optimizer).finetuning
    gradients = sum(p.grad.nbytes for p in trains)
    total = found.weight_bytes + found.learned_scale_bytes + found.optimizer_bytes + gradients
    assert total / found.codes <= 0.82


def test_residuals_that_ptq_kept_say_where_the_weight_was(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = build("llama")
    for options in ({}, {"quantization_bits": 8}, {"symmetric": False}, {"algorithm": "rtn"}):
        options = {"quantization_bits": 4, "keep_residual": True} | options
        model = quantize_model_ptq(build("llama"), **options, progress=False)
        module, weight = model.model.layers[0].mlp.up_proj, reference.model.layers[0].mlp.up_proj.weight.detach()
        groups = module.weight_scale.shape[-1]
        residual = unpack(module.weight_residual, bits=4, length=64)
        assert bool((residual.abs() <= 7).all())
        assert residual.unique().numel() == 15
        scale = scale_from_bits(module.weight_scale).repeat_interleave(64 // groups, 1)
        nearer = module.dequantize() + residual / 16 * scale
        assert sqnr_db(weight, nearer) > sqnr_db(weight, module.dequantize()) + 12
    model.save_pretrained(tmp_path / "kept")
    reloaded = type(model).from_pretrained(tmp_path / "kept")
    assert torch.equal(output(reloaded, "llama"), output(model, "llama"))
    assert str(reloaded.model.layers[0].mlp.up_proj.scheme).endswith("-residual")
    assert not reloaded.hf_quantizer.selection.schemes["lm_head"].residual
    prepare_model_for_finetuning(reloaded, rank=4, progress=False)
    assert get_quantization_info(reloaded).finetuning.residual == "ptq"
    assert torch.equal(output(reloaded, "llama"), output(model, "llama"))
    plain = packed_model("llama")
    assert not any("residual" in name for name, _ in plain.named_parameters())


def test_residuals_while_loading_and_after_qat_are_those_of_ptq(tmp_path: Path) -> None:
    from hfquant import HfQuantConfig, convert_model_qat, prepare_model_qat

    options = {"quantization_bits": 4, "keep_residual": True}
    build("mixtral").save_pretrained(tmp_path)
    expected = quantize_model_ptq(build("mixtral"), **options, progress=False)
    loaded = type(expected).from_pretrained(tmp_path, quantization_config=HfQuantConfig(**options))
    trained = convert_model_qat(prepare_model_qat(build("mixtral"), **options, progress=False))
    names = [name for name, _ in expected.named_parameters() if name.endswith("residual")]
    assert len(names) == 12
    for model in (loaded, trained):
        assert all(torch.equal(model.get_parameter(name), expected.get_parameter(name)) for name in names)


def test_a_damaged_residual_is_refused(tmp_path: Path) -> None:
    model = packed_model("llama", "int4-residual")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_residual"][0, 0] = 0  # eight residuals of -8/16
    save_file(tensors, file, metadata={"format": "pt", SAVE_ID_KEY: model.hf_quantizer.quantization_config.save_id})
    with pytest.raises(FormatError, match=r"up_proj\.weight_residual .*8 residuals are half a step"):
        type(model).from_pretrained(tmp_path)


def test_dither_follows_the_seed_and_no_other_layer() -> None:
    def residual(**options: object) -> torch.Tensor:
        model = packed_model("llama")
        prepare_model_for_finetuning(model, rank=2, progress=False, **options)
        return model.model.layers[1].mlp.up_proj.weight_residual

    first = residual()
    assert torch.equal(first, residual(target_modules=["mlp.up_proj"]))
    assert not torch.equal(first, residual(seed=1))
    codes = unpack(first, bits=4, length=64)
    assert (int(codes.min()), int(codes.max())) == (-7, 7)


def test_targets_and_modules_to_save() -> None:
    model = packed_model("llama")
    prepare_model_for_finetuning(model, target_modules=["q_proj", "layers.1.mlp"], rank=2, progress=False)
    assert {name for name, _ in adapted_modules(model)} == {
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(2)),
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    config = transformers.BertConfig(**TEXT, num_labels=3)
    head = transformers.BertForSequenceClassification(config)
    quantize_model_ptq(head, quantization_bits=4, skip_modules=["classifier"], progress=False)
    prepare_model_for_finetuning(head, rank=2, progress=False)
    assert {name for name, p in head.named_parameters() if p.requires_grad and "_l" not in name.rpartition(".")[2]} == {
        "classifier.weight",
        "classifier.bias",
    }
    other = packed_model("llama")
    prepare_model_for_finetuning(other, "scales", modules_to_save=["model.norm"], progress=False)
    assert other.model.norm.weight.requires_grad
    for options, message in (
        ({"target_modules": ["lm_head"]}, "'lm_head' matches lm_head, an embedding or output head"),
        ({"target_modules": ["q_prj"]}, "'q_prj' matches no quantized layer"),
        ({"target_modules": []}, "expected a list"),
        ({"modules_to_save": ["q_proj"]}, "is quantized: it has an adapter"),
        ({"modules_to_save": ["nothing"]}, "'nothing' matches no module"),
        ({"dropout": 0.1}, "cannot be dropped at random"),
        ({"rank": 0}, "rank=0: expected an integer from 1"),
        ({"adapter": "grids"}, "did you mean 'grid'"),
        ({"adapter": None}, "expected one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_model_for_finetuning(packed_model("llama"), **options)


def test_what_cannot_be_fine_tuned_is_refused() -> None:
    with pytest.raises(ConfigError, match="not quantized by hfquant"):
        prepare_model_for_finetuning(build("llama"))
    model = packed_model("llama")
    prepare_model_for_finetuning(model, progress=False)
    with pytest.raises(ConfigError, match="in fine-tuning already"):
        prepare_model_for_finetuning(model)
    with pytest.raises(ConfigError, match="quantized by hfquant already"):
        quantize_model_ptq(model, quantization_bits=4)
    with pytest.raises(ConfigError, match="not in fine-tuning"):
        merge_adapters(packed_model("llama"))
    model.model.layers[0].mlp.up_proj.weight_lora_A.data[0, 0] = torch.nan
    with pytest.raises(SchemeError, match=r"up_proj\.weight_lora_A is NaN"):
        merge_adapters(model)


def test_a_model_in_fine_tuning_exports_and_dequantizes_its_current_state() -> None:
    model = finetuned("llama")
    codes = codes_of(model)
    stream = open_source(model).stream()
    found = {item.name: item.packed.weight for item in stream if not isinstance(item, tuple)}
    assert all(torch.equal(found[name], words) for name, words in codes.items())
    expected = output(model, "llama")
    dequantize_model(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(output(model, "llama"), expected)


def test_plain_modules_and_native_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 64))  # noqa: E731
    model, x = make(), torch.randn(4, 64)
    quantize_model_ptq(model, quantization_bits=4, group_size=16, progress=False)
    prepare_model_for_finetuning(model, rank=2, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model(x)
        save_quantized(model, tmp_path / "model")
        assert torch.equal(load_quantized(make(), tmp_path / "model")(x), trained)
        merge_adapters(model)
        with native.selected("auto"):
            assert sqnr_db(trained, model(x)) >= NATIVE_SQNR_DB


def test_casting_keeps_the_precision_of_what_trains() -> None:
    model = finetuned("llama")
    trained = {n: p.clone() for n, p in model.named_parameters() if "_lora_" in n or n.endswith("log_scale")}
    model.to(torch.bfloat16)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in trained.items())
    assert model.model.norm.weight.dtype == torch.bfloat16
    before = output(model, "llama")
    assert before.dtype == torch.bfloat16
    merge_adapters(model)
    assert torch.equal(output(model, "llama"), before)
    assert model.dtype == torch.bfloat16


def test_a_compiled_model_trains_on_the_same_codes() -> None:
    losses, codes = [], []
    for compiled in (False, True):
        model = packed_model("llama").train()
        prepare_model_for_finetuning(model, rank=4, progress=False)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            loss = run(input_ids=torch.arange(3, 19).unsqueeze(0)).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        codes.append(codes_of(model))
    assert torch.equal(*losses)
    assert all(torch.equal(found, codes[1][name]) for name, found in codes[0].items())

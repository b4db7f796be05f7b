"""What was trained is what is deployed: equal bit for bit, for every scheme, after training."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hfquant import convert_model_qat, load_quantized, prepare_model_qat, save_quantized
from hfquant.hf.qat import converted_model
from hfquant.kernels import native
from hfquant.numerics.affine import choose_scale, scale_to_bits, split_groups
from hfquant.numerics.metrics import sqnr_db
from hfquant.qat.prepare import fake_quant_modules
from tests.support.tiny_models import TINY, build, output
from tests.support.tolerance import NATIVE_SQNR_DB


pytestmark = pytest.mark.usefixtures("reference_kernels")

SCHEMES = list(product([8, 4], ["weight_only", "dynamic", "static"], [torch.float32, torch.bfloat16]))


class Model(nn.Module):
    """Two linear layers, an embedding, and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(24, 32), nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.nn.functional.silu(self.up(self.embed(ids)))))


def trained(seed: int, bits: int, kind: str, dtype: torch.dtype, **options: object) -> tuple[Model, Tensor]:
    """A model after three optimizer steps, in eval mode, and input for it."""
    torch.manual_seed(seed)
    model, ids = Model().to(dtype), torch.randint(0, 24, (2, 5))
    group = 16 if bits == 4 and seed % 2 else None
    symmetric = seed % 3 != 0
    data = [ids] if kind == "static" else None
    scheme = {"quantization_bits": bits, "quantization_type": kind, "group_size": group, "symmetric": symmetric}
    prepare_model_qat(model, calibration_data=data, progress=False, embedding_bits=bits, **scheme, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(3):
        model(ids).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), ids


def assert_no_gap(seed: int, bits: int, kind: str, dtype: torch.dtype, folder: Path) -> None:
    model, ids = trained(seed, bits, kind, dtype)
    with torch.no_grad():
        before = model(ids)
        codes = {name: m.packed().weight for name, m in fake_quant_modules(model)}
        convert_model_qat(model)
        assert all(torch.equal(model.get_submodule(name).weight, found) for name, found in codes.items())
        assert torch.equal(model(ids), before)
        save_quantized(model, folder)
        reloaded = load_quantized(Model().to(dtype), folder).eval()
        assert torch.equal(reloaded(ids), before)
        assert all(torch.equal(reloaded.get_submodule(name).weight, found) for name, found in codes.items())


@pytest.mark.parametrize(("bits", "kind", "dtype"), SCHEMES, ids=str)
def test_trained_is_converted_is_reloaded(bits: int, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for seed in range(6):
        assert_no_gap(seed, bits, kind, dtype, tmp_path / str(seed))


@pytest.mark.parametrize("bits", [4, 8])
def test_native_kernels_compute_what_was_trained(bits: int) -> None:
    available = [isa for isa, usable in native.instruction_sets().items() if usable]
    if not available:
        pytest.skip("no native kernels were built")
    for isa, seed in product(available, range(4)):
        model, ids = trained(seed, bits, "weight_only", torch.float32)
        with torch.no_grad(), native.selected(isa):
            before = model(ids)
            convert_model_qat(model)
            assert sqnr_db(before, model(ids)) >= NATIVE_SQNR_DB


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("bits", "kind", "dtype"), SCHEMES, ids=str)
def test_trained_is_converted_is_reloaded_for_a_thousand_seeds(
    bits: int, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    for seed in range(1000):
        assert_no_gap(seed, bits, kind, dtype, tmp_path / "model")


def test_scales_derived_again_from_rounded_weights_do_differ() -> None:
    """The negative control: what others do at conversion changes codes."""
    changed = 0
    for seed in range(1, 6):
        model, ids = trained(seed, 4, "weight_only", torch.float32)
        before = model(ids)
        convert_model_qat(model)
        packed = model.up
        values = packed.dequantize()
        groups = split_groups(values, 32 // packed.weight_scale.shape[-1])
        packed.weight_scale = nn.Parameter(scale_to_bits(choose_scale(groups, bits=4)), requires_grad=False)
        changed += not torch.equal(model(ids), before)
    assert changed == 5


@pytest.mark.parametrize("variant", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt-oss", "mixtral", "llama4", "gemma3", "bart", "bert"])
def test_models_have_no_gap(name: str, variant: str, tmp_path: Path) -> None:
    model, batch = build(name), TINY[name].inputs()
    prepare_model_qat(model, quantization_bits=4, variant=variant, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(2):
        out = model(**batch)
        (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    before = output(model, name)
    parameters = {key: id(p) for key, p in model.named_parameters()}
    with converted_model(model):
        assert torch.equal(output(model, name), before)
        model.save_pretrained(tmp_path)
    assert torch.equal(output(model, name), before)
    assert {key: id(p) for key, p in model.named_parameters()} == parameters  # training goes on
    assert torch.equal(output(type(model).from_pretrained(tmp_path), name), before)


@pytest.mark.parametrize("kind", ["weight_only", "dynamic", "static"])
def test_autocast_has_no_gap(kind: str, tmp_path: Path) -> None:
    model, ids = trained(1, 4, kind, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(ids)
        convert_model_qat(model)
        assert before.dtype == torch.bfloat16
        assert torch.equal(model(ids), before)
        save_quantized(model, tmp_path / "model")
        assert torch.equal(load_quantized(Model(), tmp_path / "model").eval()(ids), before)


@pytest.mark.parametrize(
    ("kind", "dtype", "keeps"),
    [
        ("weight_only", torch.float32, False),
        ("weight_only", torch.bfloat16, True),
        ("dynamic", torch.float32, True),
    ],
)
def test_codes_that_are_kept_change_nothing_and_follow_the_optimizer(
    kind: str, dtype: torch.dtype, keeps: bool
) -> None:
    plain, ids = trained(1, 4, kind, dtype)
    kept, _ = trained(1, 4, kind, dtype)
    for _, module in fake_quant_modules(kept):
        module.keeps_codes = True
    for model in (plain, kept):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            for _ in range(2):
                model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(plain(ids), kept(ids))
    assert any(module._kept for _, module in fake_quant_modules(kept)) == keeps
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), kept.parameters(), strict=True))


def test_a_compiled_model_trains_on_the_same_codes() -> None:
    losses, codes = [], []
    for compiled in (False, True):
        model, ids = trained(1, 4, "weight_only", torch.float32)
        model.train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = run(ids).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        codes.append([module.codes() for _, module in fake_quant_modules(model)])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))

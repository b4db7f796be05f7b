import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from hfquant.errors import CalibrationError
from hfquant.nn.quant_linear import QuantLinear
from hfquant.numerics.affine import scale_from_bits
from hfquant.ptq.calibrate import calibrate_input_scales_
from hfquant.ptq.quantize_weight import quantize_weight
from hfquant.schemes import LayerScheme, WeightScheme
from tests.support.packed import pack_
from tests.support.tiny_models import build


class Model(nn.Module):
    """Two static layers, one that only some inputs reach, and one without activation scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)
        self.rare, self.plain = nn.Linear(4, 2), nn.Linear(2, 2)
        self.seen: list[bool] = []
        for name in ("first", "second", "rare"):
            pack_(getattr(self, name), "int8-channel-static")
        pack_(self.plain, "int8-channel-dynamic")

    def forward(self, x: Tensor, *, rare: bool = True, scale: Tensor | None = None) -> Tensor:
        self.seen.append(self.training)
        x = x if scale is None else x * scale
        out = self.plain(self.second(self.dropout(self.first(x)).relu()))
        return out + self.rare(x) if rare else out


def scale_of(module: nn.Module, name: str = "weight") -> float:
    packed: Any = module
    stored = packed.input_scale if name == "weight" else getattr(packed, f"{name}_input_scale")
    assert stored.shape == (1,)
    return float(scale_from_bits(stored))


def rounded(value: float) -> float:
    return float(torch.tensor(value).bfloat16())


def test_the_scale_is_the_largest_magnitude_over_127() -> None:
    model = Model()
    batches = [torch.tensor([[1.0, -3.0, 2.0, 0.0]]), torch.tensor([[2.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])]
    with torch.no_grad():
        weight = model.first.dequantize()
        inner = max(float((x @ weight.t() + model.first.bias).relu().max()) for x in batches)
    calibrate_input_scales_(model, batches, progress=False)
    assert scale_of(model.first) == scale_of(model.rare) == rounded(3 / 127)
    assert scale_of(model.second) == pytest.approx(inner / 127, rel=2**-8)
    assert "input_scale" not in dict(model.plain.named_parameters())


def test_activations_stay_in_float_while_calibrating_and_the_scale_is_fixed_afterwards() -> None:
    model, x = Model(), torch.randn(16, 4)
    calibrate_input_scales_(model, [x], progress=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = model.eval()(x), model(100 * x)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    calibrate_input_scales_(model, [x], progress=False)  # again, with scales in place: the same
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


X = torch.tensor([[1.0, -2.0, 0.5, 0.25]])
BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X,),
    "list": [X],
    "dict": {"x": X, "scale": torch.tensor(1.0)},
    "ordered-dict": OrderedDict(x=X, rare=True),
    "batch-encoding": BatchEncoding({"x": X}),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_may_be_mappings_tuples_or_tensors(kind: str) -> None:
    model = Model()
    calibrate_input_scales_(model, [BATCHES[kind]], progress=False)
    assert scale_of(model.first) == rounded(2 / 127)


def test_batches_may_come_one_by_one() -> None:
    def generated() -> Iterator[Tensor]:
        yield from (X, 2 * X)

    model = Model()
    calibrate_input_scales_(model, generated(), progress=False)
    assert scale_of(model.first) == rounded(4 / 127)


@pytest.mark.parametrize("batch", ["text", 3, None, {1, 2}], ids=repr)
def test_other_batches_are_refused(batch: object) -> None:
    with pytest.raises(CalibrationError, match=f"batch is a {type(batch).__name__}; expected a mapping"):
        calibrate_input_scales_(Model(), [X, batch], progress=False)


def test_one_batch_without_a_list_around_it_is_refused() -> None:
    with pytest.raises(CalibrationError, match="batch is a str"):
        calibrate_input_scales_(Model(), {"x": X}, progress=False)


@pytest.mark.parametrize("batches", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_data_is_an_error(batches: Any) -> None:
    with pytest.raises(CalibrationError, match="calibration_data is empty"):
        calibrate_input_scales_(Model(), batches, progress=False)


def test_a_layer_that_no_batch_reached_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"no calibration batch reached rare \(weight\); add data"):
        calibrate_input_scales_(Model(), [{"x": X, "rare": False}], progress=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_the_layer(bad: float) -> None:
    with pytest.raises(CalibrationError, match="first: activations are NaN or infinite; check"):
        calibrate_input_scales_(Model(), [X, X * bad], progress=False)


@pytest.mark.parametrize(
    ("batches", "outcome"),
    [([X], nullcontext()), ([X, X * math.nan], pytest.raises(CalibrationError)), ([], pytest.raises(CalibrationError))],
    ids=["success", "bad-activations", "no-data"],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, batches: list[Tensor], outcome: Any) -> None:
    model = Model().train(training)
    model.dropout.train(not training)  # one that differs from the whole
    flags = {name: module.training for name, module in model.named_modules()}
    with outcome:
        calibrate_input_scales_(model, batches, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(getattr(module, "input_observer", None) is None for module in model.modules())
    assert not any(model.seen)
    assert torch.is_grad_enabled()


def test_a_model_that_was_not_calibrated_gives_nan() -> None:
    model = nn.Linear(4, 2)
    result = quantize_weight(model.weight, WeightScheme(8), algorithm="rtn", name="weight")
    QuantLinear.swap_(model, LayerScheme.parse("int8-channel-static"))
    model.load_packed(result.packed)
    assert bool(model(X).isnan().all())


def test_experts_have_one_scale_for_each_product() -> None:
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    pack_(experts, "int8-channel-static")
    seen: list[float] = []
    experts.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].abs().max())))
    calibrate_input_scales_(model, [{"input_ids": torch.arange(3, 40).view(1, -1)}], progress=False)
    assert scale_of(experts, "gate_up_proj") == rounded(seen[0] / 127)
    assert scale_of(experts, "down_proj") not in (scale_of(experts, "gate_up_proj"), rounded(0.02))

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfquant.errors import SchemeError
from hfquant.nn.quant_linear import QuantLinear
from hfquant.nn.select import ModelRoles, Selection, select_modules
from hfquant.nn.swap import restore_modules_
from hfquant.ptq.quantize import quantize_modules_
from hfquant.ptq.quantize_weight import ALGORITHMS, quantize_weight
from hfquant.schemes import LayerScheme, QuantizationSettings


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(20, 32), nn.Linear(32, 48)
        self.down, self.head = Conv1D(32, 48), nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(ids))))


IDS = torch.tensor([[1, 19, 4]])
ROLES = ModelRoles(embeddings=frozenset({"embed"}), heads=frozenset({"head"}))


def selected(model: nn.Module) -> Selection:
    return select_modules(model, QuantizationSettings(4, "weight_only"), ROLES)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_with_ties_is_quantized_and_comes_back(algorithm: str) -> None:
    model = Model()
    before = model(IDS)
    weights = {name: module.weight.detach().clone() for name, module in model.named_children()}
    quantize_modules_(model, selected(model), algorithm=algorithm, progress=False)
    assert model.head.weight is model.embed.weight
    assert model.head.weight_scale is model.embed.weight_scale
    alone = quantize_weight(weights["down"].t(), model.down.scheme.weight, algorithm=algorithm, name="down")
    assert torch.equal(model.down.weight, alone.packed.weight)
    assert model.down.sqnr_db == {"weight": alone.sqnr_db}
    out = model(IDS)
    assert not torch.equal(out, before)
    restore_modules_(model)
    torch.testing.assert_close(model(IDS), out)
    assert [type(module) for module in model.children()] == [nn.Embedding, nn.Linear, Conv1D, nn.Linear]
    assert model.head.weight is model.embed.weight


def test_a_bad_weight_is_named_and_its_module_stays_float() -> None:
    model = Model()
    model.down.weight.data[3, 4] = math.nan
    with pytest.raises(SchemeError, match=r"down\.weight: 1 weights are NaN"):
        quantize_modules_(model, selected(model), algorithm="rtn", progress=False)
    assert isinstance(model.up, QuantLinear)
    assert type(model.down) is Conv1D
    assert model.down.weight.dtype == torch.float32


def test_a_module_that_stands_in_two_places_is_quantized_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantize_modules_(model, selected(model), algorithm="rtn", progress=False)
    assert isinstance(shared, QuantLinear)
    assert model[2] is model[0]
    assert model(torch.randn(3, 32)).shape == (3, 32)


def test_what_is_kept_is_not_touched() -> None:
    model = Model()
    kept = model.up.weight
    selection = Selection(schemes={"down": LayerScheme.parse("int4-g16")})
    quantize_modules_(model, selection, algorithm="rtn", progress=False)
    assert model.up.weight is kept
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.float32

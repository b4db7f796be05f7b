import pytest
import torch
from torch import nn

from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_linear import QuantLinear
from hfquant.nn.swap import packed_modules, restore_modules_, swap_modules_, tie_packed_
from hfquant.schemes import LayerScheme
from tests.support.packed import pack_


INT8 = LayerScheme.parse("int8-channel")


def tied_pair(scheme: str = "int8-channel") -> nn.Sequential:
    """An embedding and a head with a bias of its own on the same packed table."""
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 20))
    model[1].weight = model[0].weight
    pack_(model[0], scheme)
    swap_modules_(model, {"1": LayerScheme.parse(scheme)}, {"1": "0"})
    return model


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("scheme", ["int8-channel", "int4-g16", "int4-g16-asym"])
def test_ties_are_shared_and_come_back_shared(scheme: str) -> None:
    model = tied_pair(scheme)
    companions = [name for name in model[0]._parameters if name != "bias"]
    assert all(model[1]._parameters[name] is model[0]._parameters[name] for name in companions)
    bias, out = model[1].bias, model(torch.tensor([1, 2]))
    restore_modules_(model)
    assert model[1].weight is model[0].weight
    assert model[1].bias is bias
    assert [type(module) for module in model] == [nn.Embedding, nn.Linear]
    assert torch.equal(model(torch.tensor([1, 2])), out)


def test_ties_can_be_restored_after_a_cast_has_broken_them() -> None:
    model = tied_pair()
    model[1]._parameters["weight"] = nn.Parameter(model[1].weight.clone(), requires_grad=False)
    tie_packed_(model, {"1": "0"})
    assert model[1].weight is model[0].weight
    model.to(torch.bfloat16)
    assert model[1].weight is model[0].weight
    assert model[1].weight_scale is model[0].weight_scale


def test_tied_layers_keep_activation_scales_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    for module, scale in zip(model, (0.5, 0.25), strict=True):
        pack_(module, "int8-channel-static", input_scale=scale)
    tie_packed_(model, {"1": "0"})
    assert model[1].weight is model[0].weight
    assert not torch.equal(model[1].input_scale, model[0].input_scale)


def test_untied_layers_with_equal_values_stay_apart() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].load_state_dict(model[0].state_dict())
    for module in model:
        pack_(module, "int8-channel")
    restore_modules_(model)
    assert model[1].weight is not model[0].weight


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_restored_weights_take_the_dtype_that_was_asked_for(dtype: torch.dtype | None) -> None:
    model = tied_pair()
    restore_modules_(model, dtype)
    assert model[0].weight.dtype == (dtype or torch.float32)


def test_a_module_that_stands_in_two_places_is_swapped_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    pack_(shared, "int8-channel")
    assert [name for name, _ in packed_modules(model)] == ["a"]
    assert isinstance(model["b"][0], QuantLinear)
    restore_modules_(model)
    assert type(model["b"][0]) is nn.Linear


def test_models_on_the_meta_device_are_swapped_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(1 << 20, 1 << 12), nn.Linear(1 << 12, 1 << 20))
    swap_modules_(model, {"0": INT8, "1": INT8}, {"1": "0"})
    assert [type(module) for module in model] == [QuantEmbedding, QuantLinear]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model[1].weight is model[0].weight
    assert model[1].weight.shape == (1 << 20, 1 << 10)

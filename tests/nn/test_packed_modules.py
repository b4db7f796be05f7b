import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from hfquant.errors import KernelError, SchemeError
from hfquant.nn.packed_module import FloatWeight, PackedModule, is_supported, packed_bytes, packed_tensors
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_linear import QuantLinear
from hfquant.schemes import LayerScheme
from tests.support.packed import pack_
from tests.support.tolerance import SAME_VALUES, assert_close


def scaled_embedding(kind: type) -> nn.Module:
    return kind(20, 32, 0, embed_scale=5.7)


MODULES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(32, 6), lambda: torch.randn(2, 3, 32)),
    "linear-no-bias": (lambda: nn.Linear(32, 6, bias=False), lambda: torch.randn(3, 32)),
    "linear-one-output": (lambda: nn.Linear(32, 1), lambda: torch.randn(3, 32)),
    "conv1d": (lambda: Conv1D(6, 32), lambda: torch.randn(2, 3, 32)),
    "embedding": (lambda: nn.Embedding(20, 32, padding_idx=0), lambda: torch.tensor([[1, 19], [0, 3]])),
    "gemma3-embedding": (lambda: scaled_embedding(Gemma3TextScaledWordEmbedding), lambda: torch.tensor([1, 19])),
    "bart-embedding": (lambda: scaled_embedding(BartScaledWordEmbedding), lambda: torch.tensor([1, 19])),
}
SCHEMES = ["int4-g16", "int8-channel", "int4-channel-asym", "int8-g16-asym"]


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODULES)
def test_packed_module_computes_what_the_restored_one_does(name: str, scheme: str, dtype: torch.dtype) -> None:
    make, inputs = MODULES[name]
    module, x = make().to(dtype), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    before = module(x)
    packed = pack_(module, scheme)(x)
    assert (module.weight.dtype, module.weight_scale.dtype) == (torch.int32, torch.int16)
    assert packed.dtype == before.dtype
    assert not torch.equal(packed, before)
    module.restore_()
    assert module.weight.dtype == dtype
    if name == "conv1d":  # its float product adds up in another order
        assert_close(packed, x.double() @ module.weight.double() + module.bias.double(), module(x))
    else:
        assert torch.equal(module(x), packed)


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel-static", "int4-channel-asym"])
@pytest.mark.parametrize("name", MODULES)
def test_the_way_back_restores_everything_else(name: str, scheme: str) -> None:
    module, fresh = MODULES[name][0](), MODULES[name][0]()
    module.register_buffer("own_buffer", torch.ones(1))
    module.note, module.training = "kept", False
    bias = module._parameters.get("bias")
    attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    pack_(module, scheme).restore_()
    assert type(module) is type(fresh)
    assert {key: value for key, value in vars(module).items() if not key.startswith("_")} == attributes
    assert set(vars(module)) == set(vars(fresh)) | {"note"}
    assert module._parameters.get("bias") is bias
    assert [n for n in module.state_dict() if n != "own_buffer"] == list(fresh.state_dict())
    assert module.weight.requires_grad
    assert module.weight.shape == fresh.weight.shape
    assert module.weight.is_contiguous()


def test_conv1d_is_read_the_right_way_round() -> None:
    module = Conv1D(6, 32)
    module.weight.data[:, 3] *= 100  # one output channel
    original = module.weight.detach().clone()
    pack_(module, "int8-channel")
    assert (module.in_features, module.out_features) == (32, 6)
    assert module.weight_scale.shape == (6, 1)
    half_steps = original.abs().amax(0) / 254
    module.restore_()
    assert bool(((module.weight - original).abs() <= half_steps * 1.6).all())


def test_hooks_references_and_copies_survive() -> None:
    linear, calls = nn.Linear(32, 6), []
    linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_forward_pre_hook(lambda *_: calls.append("before"))
    holder = nn.Sequential(linear)
    pack_(linear, "int8-channel")
    assert holder[0] is linear
    x = torch.randn(2, 32)
    clone = copy.deepcopy(holder)
    assert torch.equal(clone(x), holder(x))
    assert calls == ["before", "after"] * 2
    clone[0].restore_()
    assert isinstance(linear, QuantLinear)
    assert type(clone[0]) is nn.Linear
    clone(x)
    assert calls == ["before", "after"] * 3


@pytest.mark.parametrize("name", MODULES)
def test_pickled_modules_compute_the_same(name: str) -> None:
    make, inputs = MODULES[name]
    module, x = pack_(make(), "int4-g16"), inputs()
    clone = pickle.loads(pickle.dumps(module))
    assert torch.equal(clone(x), module(x))
    clone.restore_()
    assert type(clone) is type(make())


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_round_trip(assign: bool) -> None:
    first, second = pack_(nn.Linear(32, 6), "int4-g16-asym"), pack_(nn.Linear(32, 6), "int4-g16-asym")
    second.load_state_dict(first.state_dict(), assign=assign)
    x = torch.randn(2, 32)
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == ["weight", "weight_scale", "weight_zero_point", "bias"]
    assert [name for name, parameter in second.named_parameters() if parameter.requires_grad] == ["bias"]


def test_float_weights_do_not_load_into_packed_ones_nor_packed_into_float() -> None:
    packed, plain = pack_(nn.Linear(32, 6), "int8-channel"), nn.Linear(32, 6)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        packed.load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        plain.load_state_dict(packed.state_dict(), strict=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_touch_neither_codes_nor_scales(dtype: torch.dtype) -> None:
    model = nn.Sequential(pack_(nn.Embedding(20, 32), "int4-g16"), pack_(nn.Linear(32, 6), "int4-g16"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype))
        assert tensor.dtype == (dtype if name.endswith("bias") else before[name].dtype)
    assert [module.compute_dtype for module in model] == [dtype, dtype]
    assert model(torch.tensor([1, 2])).dtype == dtype
    model.float()
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])
    assert model(torch.tensor([1, 2])).dtype == torch.float32


def test_moves_keep_the_compute_dtype() -> None:
    linear = pack_(nn.Linear(32, 6).bfloat16(), "int4-g16").to("meta")
    assert linear.compute_dtype == torch.bfloat16
    assert {parameter.device.type for parameter in linear.parameters()} == {"meta"}
    assert linear(torch.empty(3, 32, device="meta", dtype=torch.bfloat16)).shape == (3, 6)
    assert linear.to_empty(device="cpu").compute_dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["int8-channel", "int8-channel-dynamic", "int4-g16-static"])
def test_integers_never_train(scheme: str) -> None:
    module = pack_(nn.Linear(32, 6), scheme)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]
    x = torch.randn(2, 32, requires_grad=True)
    module(x).sum().backward()
    assert bool((x.grad != 0).any())
    assert torch.equal(module.bias.grad, torch.full((6,), 2.0))


@pytest.mark.parametrize("k", [1, 31, 33, 64])
@pytest.mark.parametrize("scheme", ["int4-channel", "int8-channel-dynamic", "int8-channel-static"])
def test_inputs_of_another_size_are_refused(scheme: str, k: int) -> None:
    with pytest.raises(KernelError, match=f"weight takes rows of 32 values, not {k}"):
        pack_(nn.Linear(32, 6), scheme)(torch.randn(2, k))


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel", "int8-channel-dynamic", "int8-channel-static"])
def test_a_module_that_nobody_filled_gives_nan(scheme: str) -> None:
    module = nn.Linear(32, 6)
    QuantLinear.swap_(module, LayerScheme.parse(scheme))
    module.weight.data.fill_(0x12345678)
    assert bool(module(torch.randn(2, 32)).isnan().all())


def test_a_group_that_does_not_divide_leaves_the_module_alone() -> None:
    module = nn.Linear(36, 6)
    with pytest.raises(SchemeError, match="in_features=36"):
        QuantLinear.swap_(module, LayerScheme.parse("int4-g16"))
    assert type(module) is nn.Linear
    assert module(torch.randn(2, 36)).shape == (2, 6)


def test_an_embedding_takes_float_ids_no_better_than_torch_does() -> None:
    with pytest.raises(RuntimeError):
        pack_(nn.Embedding(20, 32), "int4-g16")(torch.randn(3))


def test_scaled_embeddings_refill_their_buffer() -> None:
    module = pack_(scaled_embedding(Gemma3TextScaledWordEmbedding), "int8-channel")
    assert isinstance(module, QuantEmbedding)
    expected = module(torch.tensor([3]))
    module.embed_scale.fill_(-1)
    module.refill_embed_scale()
    assert torch.equal(module(torch.tensor([3])), expected)


@pytest.mark.parametrize("scheme", [*SCHEMES, "int8-channel-static", "int4-g16-asym-static"])
def test_what_is_stored_is_what_was_announced(scheme: str) -> None:
    weight, parsed = FloatWeight((6, 48)), LayerScheme.parse(scheme)
    module = pack_(nn.Linear(48, 6, bias=False), scheme)
    announced = packed_tensors("weight", weight, parsed)
    assert {name: (p.dtype, p.shape) for name, p in module.named_parameters()} == announced
    assert packed_bytes(weight, parsed) == sum(p.nbytes for p in module.parameters())
    assert module.companions() == {"weight_scale", "weight_zero_point", "input_scale", "weight_residual"}


def test_packed_bytes_counts_codes_scales_and_zero_points() -> None:
    (weight,) = QuantLinear.weights_of(nn.Linear(64, 10)).values()
    assert packed_bytes(weight, LayerScheme.parse("int4-g32")) == 10 * (64 // 2 + 2 * 2)
    assert packed_bytes(weight, LayerScheme.parse("int4-g32-asym")) == 10 * (64 // 2 + 2 * 2 + 4)
    assert packed_bytes(weight, LayerScheme.parse("int8-channel-static")) == 10 * (64 + 2) + 2


@pytest.mark.parametrize(("shape", "supported"), [((4, 1), False), ((4, 2), True), ((0, 8), False), ((4, 0), False)])
def test_a_weight_is_packed_only_if_its_shape_changes(shape: tuple[int, int], supported: bool) -> None:
    assert is_supported(FloatWeight(shape), LayerScheme.parse("int8-channel").weight) is supported


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Linear(32, 6), "QuantLinear(in_features=32, out_features=6, bias=True, scheme=int4-g16)"),
        (lambda: nn.Embedding(20, 32), "QuantEmbedding(20, 32, scheme=int4-g16)"),
        (lambda: Conv1D(6, 32), "QuantLinear(scheme=int4-g16)"),
    ],
    ids=["linear", "embedding", "conv1d"],
)
def test_description_names_scheme_and_sizes(make: Any, text: str) -> None:
    module = pack_(make(), "int4-g16")
    assert isinstance(module, PackedModule)
    assert repr(module) == text


class Doubled(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return 2 * bias


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel"])
def test_a_parametrized_bias_counts(scheme: str) -> None:
    """It is no parameter of the module any more, but it is its bias."""
    module, x = nn.Linear(32, 6), torch.randn(3, 32)
    pack_(module, scheme)
    with torch.no_grad():
        expected = module(x) + module.bias
        nn.utils.parametrize.register_parametrization(module, "bias", Doubled())
        assert torch.allclose(module(x), expected, **SAME_VALUES)

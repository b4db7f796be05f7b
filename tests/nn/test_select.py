from typing import Any

import pytest
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from hfquant.errors import ConfigError, SchemeError
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.quant_experts import QuantExperts
from hfquant.nn.quant_linear import QuantLinear
from hfquant.nn.select import ModelRoles, Selection, packed_class, select_modules, unmatched_patterns
from hfquant.nn.weight_readers import read_by_owner
from hfquant.schemes import ModuleOverride, ModulePattern, QuantizationSettings
from tests.support.packed import pack_
from tests.support.tiny_models import build


class OwnLinear(nn.Linear):
    pass


class Model(nn.Module):
    """One of every kind of layer that the rules speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 128), nn.Embedding(8, 64)
        self.up, self.down, self.subclass = nn.Linear(128, 96), nn.Linear(96, 64), OwnLinear(64, 64)
        self.encoder = nn.TransformerEncoderLayer(64, 2, 64)
        self.narrow, self.wide, self.one_group = nn.Linear(1, 64), nn.Linear(128, 1), nn.Linear(64, 8)
        self.norm, self.convolution = nn.LayerNorm(64), nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(128, 20, bias=False)


ROLES = ModelRoles(embeddings=frozenset({"embed"}), heads=frozenset({"head"}), weight_readers=read_by_owner(Model()))


def select(
    model: nn.Module | None = None, roles: ModelRoles = ROLES, *, strict: bool = False, **changes: Any
) -> Selection:
    changes = {"bits": 4, "quantization_type": "weight_only"} | changes
    return select_modules(model or Model(), QuantizationSettings(**changes), roles, strict=strict)


def schemes(selection: Selection) -> dict[str, str]:
    return {name: str(scheme) for name, scheme in selection.schemes.items()}


def override(pattern: str, **fields: Any) -> ModuleOverride:
    return ModuleOverride(ModulePattern(pattern), **fields)


def test_every_layer_is_selected_or_kept_with_a_reason() -> None:
    selection = select()
    assert schemes(selection) == {
        "embed": "int8-channel",
        "up": "int4-g64",
        "down": "int4-g32",
        "wide": "int4-g64",
        "one_group": "int4-channel",
        "head": "int8-channel",
    }
    assert selection.kept == {
        "positions": "not an input embedding",
        "subclass": "OwnLinear is a subclass of Linear whose owner may read its weight",
        "encoder.self_attn.out_proj": "NonDynamicallyQuantizableLinear is a subclass of Linear whose owner may read "
        "its weight",
        "encoder.linear1": "TransformerEncoderLayer reads this weight itself",
        "encoder.linear2": "TransformerEncoderLayer reads this weight itself",
        "narrow": "shape: too small to pack",
    }


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"skip_modules": (ModulePattern("up"),)}, "up", "skip_modules"),
        ({"skip_modules": (ModulePattern("u*"),)}, "up", "skip_modules"),
        ({"overrides": (override("up", bits=16),)}, "up", "overrides: quantization_bits=16"),
        ({"overrides": (override("head", bits=16),)}, "head", "overrides: quantization_bits=16"),
        ({"embedding_bits": 16}, "embed", "embedding_bits=16"),
        ({"embedding_bits": 16}, "head", "embedding_bits=16"),
        ({"embedding_bits": 16, "skip_modules": (ModulePattern("head"),)}, "head", "skip_modules"),
    ],
)
def test_what_the_user_asked_to_keep_is_kept(changes: dict[str, Any], name: str, reason: str) -> None:
    selection = select(**changes)
    assert selection.kept[name] == reason
    assert name not in selection.schemes
    assert "down" in selection.schemes


def test_what_the_model_insists_on_stays_in_float32() -> None:
    roles = ModelRoles(ROLES.embeddings, ROLES.heads, float32=(ModulePattern("down"),))
    assert select(roles=roles).kept["down"] == "the model lists it in _keep_in_fp32_modules"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bits": 8, "quantization_type": "dynamic"}, "int8-channel-dynamic"),
        ({"bits": 8, "quantization_type": "static", "group_size": 32}, "int8-g32-static"),
        ({"group_size": -1, "symmetric": False}, "int4-channel-asym"),
        ({"group_size": 64}, "int4-g64"),
        ({"overrides": (override("up", bits=8, group_size=-1), override("u?", bits=4))}, "int4-channel"),
        ({"group_size": 128}, "int4-channel"),
        ({"overrides": (override("u?", bits=4), override("up", bits=8))}, "int8-channel"),
        ({"overrides": (override("up", bits=16), override("up", bits=8))}, "int8-channel"),
    ],
)
def test_schemes_follow_settings_and_the_last_override(changes: dict[str, Any], expected: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(128, 96)})
    assert schemes(select(model, **changes)) == {"up": expected}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "int8-channel"),
        ({"embedding_bits": 4}, "int4-g64"),
        ({"embedding_bits": 4, "group_size": 32}, "int4-g32"),
        ({"embedding_bits": 4, "overrides": (override("embed", bits=8),)}, "int8-channel"),
        ({"embedding_bits": 16, "overrides": (override("embed", bits=4),)}, "int4-g64"),
        ({"bits": 8, "quantization_type": "dynamic"}, "int8-channel"),
        ({"bits": 8, "quantization_type": "static", "group_size": 32}, "int8-channel"),
        ({"symmetric": False}, "int8-channel-asym"),
    ],
)
def test_tables_have_bits_of_their_own_and_float_activations(changes: dict[str, Any], expected: str) -> None:
    assert schemes(select(**changes))["embed"] == expected


def test_strict_refuses_what_nobody_asked_to_keep() -> None:
    with pytest.raises(ConfigError, match="strict=True") as caught:
        select(strict=True, skip_modules=(ModulePattern("subclass"),))
    listed = str(caught.value)
    assert "narrow: shape" in listed
    assert "encoder.linear1: TransformerEncoderLayer reads" in listed
    assert "subclass" not in listed.replace("is a subclass", "")
    assert "positions" not in listed


def test_an_override_outranks_the_source_of_the_owner() -> None:
    selection = select(overrides=(override("encoder.linear1", bits=4),))
    assert "encoder.linear1" in selection.schemes
    assert "encoder.linear2" in selection.kept


def test_strict_accepts_what_was_asked_for() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 64), "up": nn.Linear(64, 64), "down": nn.Linear(64, 64)})
    asked = {"skip_modules": (ModulePattern("up"),), "embedding_bits": 16}
    assert list(select(model, strict=True, **asked).schemes) == ["down"]


def test_groups_that_do_not_fit_are_all_listed_before_any_work() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(96, 8), "c": nn.Linear(50, 8)})
    with pytest.raises(SchemeError) as caught:
        select(model, group_size=64)
    assert "b: in_features=96, group_size=64; use 32, 16 or -1" in str(caught.value)
    assert "c: in_features=50, group_size=64; use -1" in str(caught.value)
    assert "a: " not in str(caught.value)
    assert {type(module) for module in model.values()} == {nn.Linear}


def test_experts_need_a_group_that_divides_both_inputs() -> None:
    model = build("mixtral")  # K is 64 and 96
    selection = select(model, ModelRoles())
    assert schemes(selection)["model.layers.0.mlp.experts"] == "int4-g32"
    with pytest.raises(SchemeError, match="experts: in_features=64 and 96, group_size=64; use 32, 16 or -1"):
        select(model, ModelRoles(), group_size=64)


@pytest.mark.parametrize("ties", [{}, {"head.weight": "embed.weight"}], ids=["same-parameter", "named-by-the-model"])
def test_tied_layers_share_one_decision(ties: dict[str, str]) -> None:
    model = Model()
    if not ties:
        model.head.weight = model.embed.weight
    roles = ModelRoles(ROLES.embeddings, ROLES.heads, ties)
    selection = select(model, roles, overrides=(override("embed", bits=4),))
    assert selection.ties == {"head": "embed"}
    assert schemes(selection)["head"] == schemes(selection)["embed"] == "int4-g64"
    kept = select(model, roles, skip_modules=(ModulePattern("head"),)).kept
    assert (kept["embed"], kept["head"]) == ("skip_modules", "skip_modules")


def test_a_chain_of_ties_has_one_owner() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in "abc"})
    model["b"].weight = model["c"].weight = model["a"].weight
    assert select(model, ModelRoles()).ties == {"b": "a", "c": "a"}


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda m: prune.identity(m, "weight"),
    ],
    ids=["spectral-norm", "weight-norm", "pruned"],
)
def test_weights_that_are_computed_are_left_alone(change: Any) -> None:
    model = nn.ModuleDict({"a": change(nn.Linear(64, 64)), "b": nn.Linear(64, 64)})
    selection = select(model, ModelRoles())
    assert list(selection.schemes) == ["b"]
    assert selection.kept["a"] == "its weight is computed from other parameters (pruning, weight norm)"


def test_a_model_of_which_nothing_would_be_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match="no module of this model would be quantized"):
        select(nn.ModuleDict({"a": nn.Linear(64, 64)}), skip_modules=(ModulePattern("*"),))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(8, 8), QuantLinear),
        (Conv1D(8, 8), QuantLinear),
        (nn.Embedding(8, 8), QuantEmbedding),
        (nn.Embedding(8, 8, max_norm=1.0), None),
        (OwnLinear(8, 8), None),
        (nn.Bilinear(8, 8, 8), None),
        (nn.Conv1d(8, 8, 1), None),
        (build("gpt-oss").model.layers[0].mlp.experts, QuantExperts),
    ],
    ids=lambda value: "" if isinstance(value, nn.Module) else getattr(value, "__name__", "kept"),
)
def test_what_can_stand_for_what(module: nn.Module, expected: type | None) -> None:
    assert packed_class(module) is expected
    if expected is not None:
        assert packed_class(pack_(module, "int8-channel")) is expected


def test_patterns_that_match_nothing_are_named() -> None:
    patterns = [ModulePattern(text) for text in ("up", "upp", "*.linear1", "layers.0")]
    assert unmatched_patterns(patterns, Model()) == ["upp", "layers.0"]

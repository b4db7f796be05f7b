import pytest
from hypothesis import given, strategies as st

from hfquant.errors import ConfigError, SchemeError
from hfquant.schemes import (
    LayerScheme,
    ModuleOverride,
    ModulePattern,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizationSettings,
    automatic_group_size,
    make_layer_scheme,
)


schemes = st.builds(
    make_layer_scheme,
    st.sampled_from([4, 8]),
    st.sampled_from(["weight_only", "dynamic", "static"]),
    st.none() | st.integers(1, 65536),
    st.booleans(),
)


@given(schemes)
def test_a_scheme_has_one_spelling(scheme: LayerScheme) -> None:
    assert LayerScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    ["", "int4", "int3-g64", "int4-g0", "int4-g-1", "int4-g64-dyn", "INT4-g64", "int4-g64 ", 4, None, "int4-g064"],
)
def test_other_spellings_are_refused(text: object) -> None:
    with pytest.raises(SchemeError, match="is not understood"):
        LayerScheme.parse(text)


def test_granularity_says_what_shares_a_scale() -> None:
    static = LayerScheme.parse("int8-channel-static")
    dynamic = LayerScheme.parse("int4-g32-dynamic")
    assert (static.weight.granularity, static.activation.granularity) == (PerChannel(), PerTensor())
    assert (dynamic.weight.granularity, dynamic.activation.granularity) == (PerGroup(32), PerToken())
    assert [s.quantization_type for s in (static, dynamic)] == ["static", "dynamic"]


def test_groups_that_do_not_divide_name_sizes_that_do() -> None:
    with pytest.raises(SchemeError, match="in_features=96 is not a multiple of group_size=64; use 32, 16 or -1"):
        LayerScheme.parse("int4-g64").weight.groups(96)


@pytest.mark.parametrize(
    ("in_features", "parameters", "expected"),
    [
        (576, 10**8, 64),
        (1024, 10**8, 64),
        (1024, 2 * 10**9, 128),
        (96, 10**8, 32),
        (4304, 10**8, 16),
        (50, 10**8, None),
    ],
)
def test_automatic_group_is_the_largest_sensible(in_features: int, parameters: int, expected: int | None) -> None:
    assert automatic_group_size(in_features, parameters) == expected


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head_norm", False),
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("mlp.down_proj", "model.layers.3.mlp.down_proj", True),
        ("model.*.down_proj", "model.layers.3.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("layers.?.mlp", "layers.3.mlp", True),
        ("layers.?.mlp", "layers.33.mlp", False),
        ("*", "anything.at.all", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert ModulePattern(pattern).matches(name) is matches


def test_a_hostile_pattern_is_quick() -> None:
    assert not ModulePattern("*a" * 128).matches("a" * 127 + "b" * 20_000)


@pytest.mark.parametrize("text", ["", "x" * 257, None, 3])
def test_bad_patterns_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="module pattern"):
        ModulePattern(text)


def test_the_last_override_wins_field_by_field() -> None:
    settings = QuantizationSettings(
        4,
        "weight_only",
        overrides=(
            ModuleOverride(ModulePattern("mlp"), bits=8, group_size=-1),
            ModuleOverride(ModulePattern("down_proj"), bits=16),
        ),
    )
    assert settings.for_module("attn").bits == 4
    assert settings.for_module("mlp.up_proj").bits == 8
    assert (settings.for_module("mlp.down_proj").bits, settings.for_module("mlp.down_proj").group_size) == (16, -1)
    assert settings.overrides_bits("mlp.down_proj") == 16

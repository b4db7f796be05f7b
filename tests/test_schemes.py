import re

import pytest
from hypothesis import given, settings, strategies as st

from hfquant.errors import ConfigError, SchemeError
from hfquant.schemes import (
    AUTO_GROUP_SIZES,
    LayerScheme,
    ModuleOverride,
    ModulePattern,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizationSettings,
    automatic_group_size,
    fitting_group_sizes,
    make_layer_scheme,
)


schemes = st.builds(
    make_layer_scheme,
    st.sampled_from([4, 8]),
    st.sampled_from(["weight_only", "dynamic", "static"]),
    st.none() | st.integers(1, 65536),
    st.booleans(),
    st.booleans(),
)
spellings = st.from_regex(r"int[48]-(channel|g[1-9][0-9]{0,4})(-asym)?(-dynamic(-asym)?|-static)?", fullmatch=True)
names = st.text("ab.", max_size=12)
globs = st.text("ab.*?", min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(schemes)
def test_a_scheme_has_one_spelling(scheme: LayerScheme) -> None:
    assert LayerScheme.parse(str(scheme)) == scheme


@settings(deadline=None, max_examples=50)
@given(spellings)
def test_a_spelling_has_one_scheme(text: str) -> None:
    assert str(LayerScheme.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int4",
        "int3-g64",
        "int16-channel",
        "int4-g",
        "int4-g0",
        "int4-g-1",
        "int4-g064",
        "int4-g\u0666\u0664",
        "int4-g1e3",
        "int4-g64-dyn",
        "int4-g64-dynamic-asym-asym",
        "int4-g64-static-asym",
        "int4-channel-g64",
        "INT4-g64",
        "int4-g64 ",
        "int4-g64\n",
        4,
        None,
        ["int4-g64"],
    ],
    ids=repr,
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


@pytest.mark.parametrize("quantization_type", ["weight_only", "dynamic", "static"])
def test_the_users_words_come_back(quantization_type: str) -> None:
    assert make_layer_scheme(8, quantization_type, None, True).quantization_type == quantization_type


@pytest.mark.parametrize(
    ("in_features", "group_size", "advice"),
    [(96, 64, "use 32, 16 or -1"), (640, 48, "use 128, 64, 32, 16 or -1"), (50, 16, "use -1"), (7, 64, "use -1")],
)
def test_groups_that_do_not_divide_name_sizes_that_do(in_features: int, group_size: int, advice: str) -> None:
    message = f"in_features={in_features} is not a multiple of group_size={group_size}; {advice}"
    with pytest.raises(SchemeError, match=message):
        LayerScheme.parse(f"int4-g{group_size}").weight.groups(in_features)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 512), st.integers(1, 16))
def test_groups_cover_the_row(group_size: int, count: int) -> None:
    assert LayerScheme.parse(f"int4-g{group_size}").weight.groups(group_size * count) == count
    assert LayerScheme.parse("int4-channel").weight.groups(group_size * count) == 1


@pytest.mark.parametrize(
    ("in_features", "parameters", "expected"),
    [
        (576, 10**8, 64),
        (1024, 10**8, 64),
        (1024, 10**9, 64),
        (1024, 10**9 + 1, 128),
        (96, 10**8, 32),
        (4304, 10**8, 16),
        (50, 10**8, None),
    ],
)
def test_automatic_group_is_the_largest_sensible(in_features: int, parameters: int, expected: int | None) -> None:
    assert automatic_group_size(in_features, parameters) == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20_000), st.sampled_from([10**6, 10**10]))
def test_automatic_group_divides_and_none_larger_does(in_features: int, parameters: int) -> None:
    chosen = automatic_group_size(in_features, parameters)
    sensible = [size for size in AUTO_GROUP_SIZES if size <= (64 if parameters == 10**6 else 128)]
    dividing = [size for size in sensible if in_features % size == 0]
    assert chosen == max(dividing, default=None)
    assert chosen is None or str(chosen) in fitting_group_sizes(in_features)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head_norm", False),
        ("lm_head", "", False),
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("layers.1", "model.layers.0.1", False),
        ("mlp.down_proj", "model.layers.3.mlp.down_proj", True),
        ("model.*.down_proj", "model.layers.3.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("layers.?.mlp", "layers.3.mlp", True),
        ("layers.?.mlp", "layers.33.mlp", False),
        ("layers.[0-9].mlp", "layers.3.mlp", False),
        ("layers.(0|3).mlp", "layers.3.mlp", False),
        ("*", "anything.at.all", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert ModulePattern(pattern).matches(name) is matches


@settings(deadline=None, max_examples=200)
@given(globs.filter(lambda text: "*" in text or "?" in text), names)
def test_globs_match_like_the_regular_expression(pattern: str, name: str) -> None:
    expression = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)
    assert ModulePattern(pattern).matches(name) is (re.fullmatch(expression, name) is not None)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=5), st.data())
def test_components_match_as_a_run(parts: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=2))
    runs = [parts[i : i + len(wanted)] for i in range(len(parts))]
    assert ModulePattern(".".join(wanted)).matches(".".join(parts)) is (wanted in runs)


def test_a_hostile_pattern_is_quick() -> None:
    # Backtracking over every star would take longer than the universe has existed.
    assert not ModulePattern("*a" * 128).matches("a" * 127 + "b" * 20_000)
    assert not ModulePattern("*?" * 127 + "*c").matches("a" * 20_000)


@pytest.mark.parametrize("text", ["", "x" * 257, None, 3])
def test_bad_patterns_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="module pattern"):
        ModulePattern(text)


def test_the_last_override_wins_field_by_field() -> None:
    first = ModuleOverride(ModulePattern("mlp"), bits=8, group_size=-1)
    second = ModuleOverride(ModulePattern("down_proj"), bits=16)
    settings = QuantizationSettings(4, "weight_only", overrides=(first, second))
    assert settings.for_module("attn") is settings
    assert settings.for_module("mlp.up_proj").bits == 8
    assert (settings.for_module("mlp.down_proj").bits, settings.for_module("mlp.down_proj").group_size) == (16, -1)
    assert [settings.overrides_bits(name) for name in ("attn", "mlp.up_proj", "mlp.down_proj")] == [None, 8, 16]
    swapped = QuantizationSettings(4, "weight_only", overrides=(second, first))
    assert swapped.overrides_bits("mlp.down_proj") == 8


def test_an_override_may_say_false() -> None:
    override = ModuleOverride(ModulePattern("mlp"), symmetric=False)
    assert QuantizationSettings(4, "weight_only", overrides=(override,)).for_module("mlp").symmetric is False

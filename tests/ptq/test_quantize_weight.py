import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hfquant.errors import SchemeError
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.metrics import sqnr_db
from hfquant.numerics.packing import has_clean_padding
from hfquant.ptq import quantize_weight as module
from hfquant.ptq.quantize_weight import ALGORITHMS, QuantizedWeight, quantize_weight
from hfquant.schemes import LayerScheme, WeightScheme


SCHEMES = ["int4-g16", "int4-channel", "int4-g16-asym", "int8-channel", "int8-g16", "int8-channel-asym"]


def parse(text: str) -> WeightScheme:
    return LayerScheme.parse(text).weight


def quantized(weight: Tensor, scheme: str, algorithm: str = "rtn") -> QuantizedWeight:
    return quantize_weight(weight, parse(scheme), algorithm=algorithm, name="layers.0.weight")


def values(result: QuantizedWeight, weight: Tensor, scheme: str) -> Tensor:
    bits = parse(scheme).bits
    return dequantize_weight(*result.packed, bits=bits, in_features=weight.shape[-1], dtype=torch.float32)


def assert_same(first: QuantizedWeight, second: QuantizedWeight) -> None:
    for a, b in zip(first.packed, second.packed, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert first.sqnr_db == pytest.approx(second.sqnr_db, rel=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_packed_is_near_the_weight(scheme: str, algorithm: str) -> None:
    weight = torch.randn(12, 80)
    result = quantized(weight, scheme, algorithm)
    approximation = values(result, weight, scheme)
    assert result.sqnr_db == pytest.approx(sqnr_db(weight, approximation), abs=1e-3)
    assert result.sqnr_db > (38 if "int8" in scheme else 17)
    assert has_clean_padding(result.packed.weight, bits=parse(scheme).bits, length=80)
    assert (result.packed.weight_zero_point is None) is parse(scheme).symmetric


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk", [1, 80, 81, 200, 80 * 13 - 1])
def test_chunks_do_not_change_the_result(
    scheme: str, algorithm: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(13, 80)
    whole = quantized(weight, scheme, algorithm)
    monkeypatch.setattr(module, "CHUNK_WEIGHTS", chunk)
    assert_same(quantized(weight, scheme, algorithm), whole)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_quantized_one_by_one(scheme: str, algorithm: str) -> None:
    weight, order = torch.randn(6, 32), torch.tensor([3, 1, 5, 0, 2, 4])
    whole, permuted = (quantized(w, scheme, algorithm).packed for w in (weight, weight[order]))
    for a, b in zip(whole, permuted, strict=True):
        assert (a is None and b is None) or torch.equal(a[order], b)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_are_stacked_matrices(scheme: str, algorithm: str) -> None:
    weight = torch.randn(3, 5, 32)
    result = quantized(weight, scheme, algorithm)
    assert result.packed.weight.shape == (3, 5, 32 * parse(scheme).bits // 32)
    for expert in range(3):
        alone = quantized(weight[expert], scheme, algorithm)
        for a, b in zip(result.packed, alone.packed, strict=True):
            assert (a is None and b is None) or torch.equal(a[expert], b)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel"])
def test_half_precision_weights_are_quantized_in_float32(scheme: str, dtype: torch.dtype, algorithm: str) -> None:
    weight = torch.randn(6, 32).to(dtype)
    assert_same(quantized(weight, scheme, algorithm), quantized(weight.float(), scheme, algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transposed_and_frozen_and_trained_weights_are_the_same(scheme: str, algorithm: str) -> None:
    weight = torch.randn(32, 6)
    parameter = torch.nn.Parameter(weight.clone())
    expected = quantized(weight.t().contiguous(), scheme, algorithm)
    assert_same(quantized(parameter.t(), scheme, algorithm), expected)
    assert not expected.packed.weight.requires_grad


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(sorted(ALGORITHMS)),
    st.sampled_from([1e-38, 1e-20, 1e-6, 1.0, 1e6, 1e20]),
    st.integers(0, 2**16),
)
def test_scales_are_usable_whatever_the_weights(scheme: str, algorithm: str, magnitude: float, seed: int) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * magnitude
    weight[0] = 0
    weight[1, 3] *= 1000
    result = quantized(weight, scheme, algorithm)
    scale = scale_from_bits(result.packed.weight_scale)
    assert bool((torch.isfinite(scale) & (scale != 0)).all())
    assert bool((scale > 0).all()) or parse(scheme).bits == 4
    found = values(result, weight, scheme)
    assert bool((found[0] == 0).all())
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_constant_weight_is_kept_as_well_as_the_grid_allows(scheme: str, algorithm: str) -> None:
    weight = torch.full((2, 32), -0.37)
    assert quantized(weight, scheme, algorithm).sqnr_db > 20


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_on_the_grid_lose_nothing(algorithm: str) -> None:
    weight = torch.arange(-127, 128).repeat(2, 1).float()[:, :254] * 0.5
    assert quantized(weight, "int8-channel", algorithm).sqnr_db == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_that_are_not_finite_are_counted_and_named(algorithm: str, bad: float) -> None:
    weight = torch.randn(6, 32)
    weight[2, 3] = weight[4, 5] = bad
    with pytest.raises(SchemeError, match=r"layers\.0\.weight: 2 weights are NaN or infinite.*skip_modules"):
        quantized(weight, "int4-g16", algorithm)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match="in_features=36"):
        quantized(torch.randn(2, 36), "int4-g16")

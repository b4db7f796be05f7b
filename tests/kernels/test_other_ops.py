import math

import pytest
import torch
from torch import Tensor

from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.quant_embedding import quant_embedding
from hfquant.kernels.quantize_rows import quantize_rows
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.packing import PackedWeight, pack
from tests.support.linear_case import DTYPES


GROUPS = [(64, 2), (100, 1), (7, 7), (2, 1), (1025, 5)]


def packed_table(rows: int, k: int, bits: int, groups: int, *, symmetric: bool = True) -> tuple[PackedWeight, Tensor]:
    """A packed table and its values by hand."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, k), dtype=torch.int8)
    zero = None if symmetric else torch.randint(low, high, (rows, groups), dtype=torch.int8)
    scale = (torch.rand(rows, groups) + 0.5).bfloat16().float() * torch.randn(rows, groups).sign()
    shift = 0 if zero is None else zero.repeat_interleave(k // groups, 1).long()
    values = (codes.long() - shift).double() * scale.double().repeat_interleave(k // groups, 1)
    packed_zero = None if zero is None else pack(zero, bits=bits)
    return PackedWeight(pack(codes, bits=bits), scale_to_bits(scale), packed_zero), values.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("k", "groups"), GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_and_embedding_give_the_values(
    bits: int, k: int, groups: int, symmetric: bool, dtype: torch.dtype
) -> None:
    table, values = packed_table(11, k, bits, groups, symmetric=symmetric)
    whole = dequantize_weight(*table, bits=bits, in_features=k, dtype=dtype)
    assert torch.equal(whole, values.to(dtype))
    for ids in (torch.tensor([[0, 10, 3], [3, 3, 7]]), torch.tensor(5), torch.tensor([4], dtype=torch.int32)):
        rows = quant_embedding(ids, *table, bits=bits, embedding_dim=k, dtype=dtype)
        assert rows.dtype == dtype
        assert torch.equal(rows, values[ids.long()].to(dtype))


def test_dequantize_of_experts_and_of_nothing() -> None:
    (words, scale, _), values = packed_table(6, 32, 4, 2)
    stacked = dequantize_weight(
        words.view(2, 3, -1), scale.view(2, 3, 2), None, bits=4, in_features=32, dtype=torch.float32
    )
    assert torch.equal(stacked, values.view(2, 3, 32))
    empty = dequantize_weight(words[:0], scale[:0], None, bits=4, in_features=32, dtype=torch.float32)
    assert empty.shape == (0, 32)


def test_an_embedding_of_no_ids_is_empty() -> None:
    table, _ = packed_table(6, 32, 4, 2, symmetric=False)
    ids = torch.empty(2, 0, dtype=torch.int64)
    assert quant_embedding(ids, *table, bits=4, embedding_dim=32, dtype=torch.float32).shape == (2, 0, 32)


@pytest.mark.parametrize("bad", [6, -1, 2**31])
def test_ids_outside_the_table_are_refused(bad: int) -> None:
    table, _ = packed_table(6, 32, 4, 2)
    with pytest.raises(IndexError):
        quant_embedding(torch.tensor([bad]), *table, bits=4, embedding_dim=32, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (64, 7), (0, 8)], ids=str)
def test_rows_are_quantized_one_by_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    codes, scale, _ = quantize_rows(x)
    assert scale.shape == (shape[0], 1)
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / 127)
    assert torch.equal(codes, (x.float() / scale).round().to(torch.int8))
    assert torch.equal(codes.abs().amax(1), torch.full(shape[:1], 127, dtype=torch.int8))


def test_rows_of_any_layout() -> None:
    x = torch.randn(40, 5)
    codes, scale, _ = quantize_rows(x.t())
    expected = quantize_rows(x.t().contiguous())
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


def test_bad_rows_have_bad_scales_and_codes_all_the_same() -> None:
    x = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [0.0, 0.0], [-127.0, 63.5]])
    codes, scale, _ = quantize_rows(x)
    assert torch.isfinite(scale).flatten().tolist() == [False, False, True, True]
    assert codes[2:].tolist() == [[0, 0], [-127, 64]]


def test_static_rows_share_the_stored_scale() -> None:
    x = torch.tensor([[0.5, -3.0, 100.0], [0.0, math.nan, 1.0], [math.inf, -math.inf, 0.75]])
    codes, scale, _ = quantize_rows(x, torch.tensor([0.5]))
    assert codes[0].tolist() == [1, -6, 127]
    assert codes[2].tolist() == [127, -128, 2]
    assert scale[[0, 2]].flatten().tolist() == [0.5, 0.5]
    assert bool(scale[1].isnan())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int, symmetric: bool) -> None:
    table, _ = packed_table(6, 32, bits, 2, symmetric=symmetric)
    ids = torch.tensor([1, 2])
    calls = [
        (torch.ops.hfquant.dequantize.default, (*table, bits, 32, torch.bfloat16)),
        (torch.ops.hfquant.quant_embedding.default, (ids, *table, bits, 32, torch.bfloat16)),
        (torch.ops.hfquant.quantize_rows.default, (torch.randn(3, 8), None, False)),
        (torch.ops.hfquant.quantize_rows.default, (torch.randn(3, 8), None, True)),
        (torch.ops.hfquant.quantize_rows.default, (torch.randn(3, 8), torch.tensor([0.5]), False)),
    ]
    for op, arguments in calls:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asymmetric_rows_span_their_range(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(6, 40), torch.rand(1, 40), -torch.rand(1, 40), torch.zeros(1, 40)]).to(dtype)
    codes, scale, zero_point = quantize_rows(x, asymmetric=True)
    low, high = x.float().amin(1).clamp(max=0), x.float().amax(1).clamp(min=0)
    assert torch.equal(scale[:-1].flatten(), ((high - low) / 255)[:-1])
    assert zero_point[-3:].flatten().tolist() == [-128, 127, -128]
    values = (codes.double() - zero_point) * scale.double()
    assert bool(((values - x.double()).abs() <= scale.double() * (0.5 + 2**-15) + 1e-30).all())

import pytest
import torch

from hfquant.kernels import integer_matmul as matmul
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.quant_embedding import quant_embedding
from hfquant.kernels.quantize_rows import quantize_rows
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.packing import pack


def packed_table(rows: int, k: int, bits: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scale bits, and the values by hand."""
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, k), dtype=torch.int8)
    scale = (torch.rand(rows, groups) + 0.5).bfloat16().float()
    return pack(codes, bits=bits), scale_to_bits(scale), codes.float() * scale.repeat_interleave(k // groups, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "groups"), [(64, 2), (100, 1), (7, 7)])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_and_embedding_give_the_values(bits: int, k: int, groups: int, dtype: torch.dtype) -> None:
    words, scale, values = packed_table(11, k, bits, groups)
    whole = dequantize_weight(words, scale, None, bits=bits, in_features=k, dtype=dtype)
    assert torch.equal(whole, values.to(dtype))
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    rows = quant_embedding(ids, words, scale, None, bits=bits, embedding_dim=k, dtype=dtype)
    assert torch.equal(rows, values[ids].to(dtype))


def test_dequantize_of_experts_and_of_nothing() -> None:
    words, scale, values = packed_table(6, 32, 4, 2)
    stacked = dequantize_weight(
        words.view(2, 3, -1), scale.view(2, 3, 2), None, bits=4, in_features=32, dtype=torch.float32
    )
    assert torch.equal(stacked, values.view(2, 3, 32))
    empty = dequantize_weight(words[:0], scale[:0], None, bits=4, in_features=32, dtype=torch.float32)
    assert empty.shape == (0, 32)


def test_ids_outside_the_table_are_refused() -> None:
    words, scale, _ = packed_table(6, 32, 4, 2)
    with pytest.raises(IndexError):
        quant_embedding(torch.tensor([6]), words, scale, None, bits=4, embedding_dim=32, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_quantized_one_by_one(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40).to(dtype)
    codes, scale = quantize_rows(x)
    assert torch.equal(scale.flatten(), x.float().abs().amax(1) / 127)
    assert torch.equal(codes, (x.float() / scale).round().to(torch.int8))
    assert int(codes.abs().max()) == 127


def test_static_rows_share_the_stored_scale() -> None:
    x = torch.tensor([[0.5, -3.0, 100.0], [0.0, float("nan"), 1.0]])
    codes, scale = quantize_rows(x, torch.tensor([0.5]))
    assert codes[0].tolist() == [1, -6, 127]
    assert scale[0].item() == 0.5
    assert bool(scale[1].isnan())


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (3, 1025, 5), (2, 3000, 1), (17, 64, 33), (0, 8, 3), (2, 70_000, 2)]
)
@pytest.mark.parametrize("fast", [True, False])
def test_integer_products_are_exact(m: int, k: int, n: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fast and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("torch._int_mm is not used on this machine")
    monkeypatch.setattr(matmul, "_has_fast_int_mm", lambda a: fast)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    a[:1], b[:1] = -128, -128  # the largest sum there is
    expected = (a.long() @ b.long().t()).float()
    assert torch.equal(matmul.integer_matmul(a, b), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    words, scale, _ = packed_table(6, 32, bits, 2)
    ids = torch.tensor([1, 2])
    calls = {
        torch.ops.hfquant.dequantize.default: (words, scale, None, bits, 32, torch.float32),
        torch.ops.hfquant.quant_embedding.default: (ids, words, scale, None, bits, 32, torch.float32),
        torch.ops.hfquant.quantize_rows.default: (torch.randn(3, 8), None),
    }
    for op, arguments in calls.items():
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}

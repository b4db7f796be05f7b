import pytest
import torch
from hypothesis import given, settings, strategies as st

from hfquant.numerics.packing import has_clean_padding, pack, packed_length, unpack


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([4, 8]), st.integers(1, 70), st.integers(0, 2**16))
def test_unpack_undoes_pack(bits: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (2, 3, length), generator=generator).to(torch.int8)
    words = pack(codes, bits=bits)
    assert words.shape == (2, 3, packed_length(length, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits=bits, length=length), codes)
    assert has_clean_padding(words, bits=bits, length=length)


def test_layout_of_int4_words() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 7]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack(codes, bits=4).flatten().tolist()] == [0x76543210, 0x0000000F]


def test_layout_of_int8_words() -> None:
    codes = torch.tensor([[-128, -127, 0, 127, 1]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack(codes, bits=8).flatten().tolist()] == [0xFF800100, 0x00000081]


def test_the_order_is_least_significant_first_with_an_offset() -> None:
    codes = torch.randint(-8, 8, (1, 16), dtype=torch.int8)
    expected = [sum((int(c) + 8) << (4 * i) for i, c in enumerate(codes[0, s : s + 8])) for s in (0, 8)]
    assert [word & 0xFFFFFFFF for word in pack(codes, bits=4).flatten().tolist()] == expected


@pytest.mark.parametrize(("bits", "length", "bad"), [(4, 9, 1 << 4), (4, 9, 1 << 31), (8, 5, 1 << 8), (8, 7, 1 << 30)])
def test_bits_behind_the_codes_are_noticed(bits: int, length: int, bad: int) -> None:
    words = pack(torch.zeros(3, length, dtype=torch.int8), bits=bits)
    words[1, -1] = words[1, -1] | (bad if bad < 1 << 31 else bad - (1 << 32))
    assert not has_clean_padding(words, bits=bits, length=length)


def test_words_of_a_view_are_unpacked() -> None:
    words = pack(torch.randint(-8, 8, (4, 32), dtype=torch.int8), bits=4)
    assert torch.equal(unpack(words.t().contiguous().t(), bits=4, length=32), unpack(words, bits=4, length=32))

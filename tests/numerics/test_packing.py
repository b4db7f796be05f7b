import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hfquant.numerics.packing import has_clean_padding, pack, packed_length, unpack


bits_of = st.sampled_from([4, 8])
lengths = st.integers(1, 70)
seeds = st.integers(0, 2**16)


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=generator).to(torch.int8)


def unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


@settings(deadline=None, max_examples=50)
@given(bits_of, lengths, seeds)
def test_unpack_undoes_pack(bits: int, length: int, seed: int) -> None:
    codes = random_codes(2, 3, length, bits=bits, seed=seed)
    words = pack(codes, bits=bits)
    assert words.shape == (2, 3, packed_length(length, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits=bits, length=length), codes)
    assert has_clean_padding(words, bits=bits, length=length)


@settings(deadline=None, max_examples=50)
@given(bits_of, lengths, seeds)
def test_the_order_is_least_significant_first_with_an_offset(bits: int, length: int, seed: int) -> None:
    codes = random_codes(1, length, bits=bits, seed=seed)
    per_word, offset = 32 // bits, 1 << (bits - 1)
    expected = [0] * packed_length(length, bits)
    for i, code in enumerate(codes[0].tolist()):
        expected[i // per_word] |= (code + offset) << (bits * (i % per_word))
    assert unsigned(pack(codes, bits=bits)) == expected


def test_layout_of_int4_words() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 7]], dtype=torch.int8)
    assert unsigned(pack(codes, bits=4)) == [0x76543210, 0x0000000F]


def test_layout_of_int8_words() -> None:
    codes = torch.tensor([[-128, -127, 0, 127, 1]], dtype=torch.int8)
    assert unsigned(pack(codes, bits=8)) == [0xFF800100, 0x00000081]


@settings(deadline=None, max_examples=50)
@given(bits_of, st.integers(2, 70))
def test_a_packed_row_is_shorter_than_the_float_row(bits: int, length: int) -> None:
    assert packed_length(length, bits) < length


@pytest.mark.parametrize(("bits", "length"), [(4, 9), (4, 15), (4, 1), (8, 5), (8, 7), (8, 1)])
def test_every_bit_behind_the_codes_is_noticed(bits: int, length: int) -> None:
    clean = pack(random_codes(3, length, bits=bits), bits=bits)
    for position in range(length * bits % 32, 32):
        words = clean.clone()
        words[1, -1] ^= (1 << position) if position < 31 else -(1 << 31)
        assert not has_clean_padding(words, bits=bits, length=length)
        assert torch.equal(unpack(words, bits=bits, length=length), unpack(clean, bits=bits, length=length))


@pytest.mark.parametrize(("bits", "length"), [(4, 16), (8, 8)])
def test_full_words_have_no_padding(bits: int, length: int) -> None:
    assert has_clean_padding(torch.full((2, 2), -1, dtype=torch.int32), bits=bits, length=length)
    assert has_clean_padding(torch.empty(0, 2, dtype=torch.int32), bits=bits, length=length - 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_views_are_packed_and_unpacked(bits: int) -> None:
    codes = random_codes(64, 4, bits=bits)
    words = pack(codes.t(), bits=bits)
    assert torch.equal(words, pack(codes.t().contiguous(), bits=bits))
    strided = words.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(unpack(strided, bits=bits, length=64), codes.t())
    assert torch.equal(unpack(words[1::2], bits=bits, length=64), codes.t()[1::2])


@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows_are_packed_too(bits: int) -> None:
    words = pack(torch.empty(0, 9, dtype=torch.int8), bits=bits)
    assert words.shape == (0, packed_length(9, bits))
    assert unpack(words, bits=bits, length=9).shape == (0, 9)

"""Calibration data in every form, and what is refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from hfquant import CalibrationError, quantize_model_ptq
from hfquant.ptq.calibration_data import CalibrationFormat, prepare_calibration
from tests.support.tiny_models import build


FORM = CalibrationFormat(samples=4, length=8, vocab_size=128, batch_size=2)


def letters(text: str) -> list[int]:
    return [ord(letter) % 128 for letter in text]


class Rows:
    """What counts of a ``datasets.Dataset``."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __iter__(self) -> Any:
        return (dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=20), min_size=1, max_size=6))
def test_packing_drops_nothing(rows: list[list[int]]) -> None:
    form = CalibrationFormat(samples=1000, length=8, vocab_size=128)
    found = prepare_calibration(rows, form, None)
    packed = [token for batch in found.batches for token in batch["input_ids"].flatten().tolist()]
    assert packed == [token for row in rows for token in row]
    assert found.tokens == len(packed)


def test_every_form_gives_the_same(tmp_path: Path) -> None:
    text = "the quick brown fox jumps"
    (tmp_path / "t.txt").write_text(text)
    forms = [tmp_path / "t.txt", str(tmp_path / "t.txt"), [text], [letters(text)], [torch.tensor(letters(text))]]
    forms += [Rows(text=[text], label=[1]), Rows(input_ids=[letters(text)])]
    hashes = {prepare_calibration(form, FORM, letters).sha256 for form in forms}
    assert len(hashes) == 1
    assert prepare_calibration([text + "s"], FORM, letters).sha256 not in hashes


def test_a_model_that_reads_sentences_gets_them_whole() -> None:
    form = CalibrationFormat(length=8, packed=False, vocab_size=128)
    found = prepare_calibration(["ab", "cde", "fg", "a" * 20], form, letters)
    shapes = sorted(tuple(batch["input_ids"].shape) for batch in found.batches)
    assert shapes == [(1, 3), (1, 8), (2, 2)]


def test_the_choice_follows_the_seed() -> None:
    rows = [list(range(100))]
    one, same, other = (
        prepare_calibration(rows, CalibrationFormat(samples=3, length=8, seed=seed), None) for seed in (0, 0, 1)
    )
    assert one.sha256 == same.sha256 != other.sha256
    assert one.tokens == 24


def test_batches_are_taken_as_they_are() -> None:
    batches = [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}, (torch.ones(1, 2),), torch.ones(2, 2)]
    assert prepare_calibration(iter(batches), FORM, None).batches == tuple(batches)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration_data is empty"),
        ([""], "holds no token"),
        ("no such file", "no text file"),
        ({"input_ids": torch.ones(1, 2)}, "one mapping; put batches into a list"),
        (3, "is a int; expected a text file"),
        ([[1, 128]], "token id 128; the model knows 0 to 127"),
        ([[1], "text", {"a": 1}], "mixes token ids or texts with a dict"),
        (Rows(label=[1]), r"has columns \['label'\]; expected input_ids or one of text"),
    ],
    ids=["empty", "no-text", "no-file", "mapping", "number", "other-tokenizer", "mixed", "columns"],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        prepare_calibration(data, FORM, letters)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="pass tokenizer="):
        quantize_model_ptq(build("llama"), quantization_bits=4, calibration_data=["text"], progress=False)
    with pytest.raises(CalibrationError, match="calibration_length=4096: the model has 64 positions"):
        quantize_model_ptq(build("llama"), calibration_data=[[1, 2]], calibration_length=4096, progress=False)

"""Calibration data in any of the forms people have it in, as batches a model can be called with.

Texts and token ids are packed: joined and cut into windows of equal length, the short rest included, so that nothing
is dropped for being short. A model that reads sentences one by one (an encoder) gets each text as a row of its own,
together with the texts of the same length, so that no padding is ever seen.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import CalibrationError


TEXT_COLUMNS = ("text", "content", "sentence")
"""Columns of a dataset that are looked for, after ``input_ids``."""

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class CalibrationFormat:
    """What batches have to look like.

    Attributes:
        samples: Windows, or texts of a model that reads them one by one, at most.
        length: Tokens in a window.
        packed: Join texts before cutting.
        batch_size: Windows in one batch.
        argument_names: Arguments of the model that take the token ids.
        vocab_size: Ids must be below it.
        seed: Of the choice where there is more data than ``samples``.
    """

    samples: int = 128
    length: int = 512
    packed: bool = True
    batch_size: int = 4
    argument_names: tuple[str, ...] = ("input_ids",)
    vocab_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class CalibrationSet:
    """Batches, and what is recorded of them.

    Attributes:
        batches: What the model is called with.
        tokens: Token ids in all batches; 0 where batches hold none.
        sha256: Of the content of all batches.
        seed: Of the choice.
    """

    batches: tuple[Any, ...]
    tokens: int
    sha256: str
    seed: int

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"batches": len(self.batches), "tokens": self.tokens, "sha256": self.sha256, "seed": self.seed}


def prepare_calibration(data: Any, form: CalibrationFormat, tokenize: Tokenize | None) -> CalibrationSet:
    """Turn ``data`` into batches.

    Args:
        data: A text file (path), texts, lists of token ids, a ``datasets.Dataset``, or batches (a DataLoader, a list
            of mappings, tuples or tensors), which are taken as they are.
        form: What batches have to look like.
        tokenize: Text to token ids with the special tokens of the model; ``None`` if there is no tokenizer.

    Raises:
        CalibrationError: If there is nothing in it, it holds texts and there is no tokenizer, an id is outside of the
            vocabulary, or it is none of the above.
    """
    rows = _rows(data, packed=form.packed)
    try:
        first = next(rows)
    except StopIteration:
        raise CalibrationError(
            "calibration_data is empty; give at least one batch, text or list of token ids"
        ) from None
    rows = chain([first], rows)
    if _is_row(first):
        if not form.packed:
            rows = islice(rows, form.samples)
        batches = _batches([_token_ids(row, tokenize, form) for row in rows], form)
    else:
        batches = list(rows)
    return CalibrationSet(tuple(batches), _count_tokens(batches), content_sha256(batches), form.seed)


def _rows(data: Any, *, packed: bool) -> Any:
    if isinstance(data, (str, Path)):
        text = _read_text(Path(data))
        return iter([text] if packed else [line for line in text.splitlines() if line.strip()])
    if isinstance(data, Mapping):
        raise CalibrationError("calibration_data is one mapping; put batches into a list: [batch]")
    if hasattr(data, "column_names"):
        return _dataset_rows(data)
    try:
        return iter(data)
    except TypeError:
        raise CalibrationError(
            f"calibration_data is a {type(data).__name__}; expected a text file, texts, token ids, a dataset or batches"
        ) from None


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(
            f"calibration_data={str(file)[:80]!r}: no text file ({error.strerror}); for texts give a list of strings"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration_data={str(file)!r}: not UTF-8 text: {error}") from error
    return text


def _dataset_rows(data: Any) -> Any:
    names = list(data.column_names or ())
    found = next((name for name in ("input_ids", *TEXT_COLUMNS) if name in names), None)
    if found is None:
        raise CalibrationError(
            f"the dataset has columns {names}; expected input_ids or one of {', '.join(TEXT_COLUMNS)}; rename one"
        )
    return (row[found] for row in data)


def _is_row(item: Any) -> bool:
    """Whether ``item`` is a text or a sequence of token ids, not a batch."""
    if isinstance(item, str):
        return True
    if isinstance(item, Tensor):
        return item.ndim == 1 and not item.is_floating_point()
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(type(value) is int for value in item)


def _token_ids(row: Any, tokenize: Tokenize | None, form: CalibrationFormat) -> Tensor:
    if isinstance(row, str):
        if tokenize is None:
            raise CalibrationError(
                "calibration_data holds texts, which a plain module cannot take; give batches that it is called with"
            )
        row = tokenize(row)
    elif not _is_row(row):
        raise CalibrationError(f"calibration_data mixes token ids or texts with a {type(row).__name__}; give one kind")
    ids = torch.as_tensor(row, dtype=torch.int64)
    limit = form.vocab_size
    if ids.numel() and (int(ids.min()) < 0 or (limit is not None and int(ids.max()) >= limit)):
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise CalibrationError(
            f"calibration_data holds token id {worst}; the model knows 0 to {'...' if limit is None else limit - 1}. "
            "Was it made with another tokenizer?"
        )
    return ids


def _batches(rows: list[Tensor], form: CalibrationFormat) -> list[dict[str, Tensor]]:
    if form.packed:
        windows = [window for window in torch.cat(rows).split(form.length) if window.numel()]
    else:
        windows = [row[: form.length] for row in rows if row.numel()]
    if not windows:
        raise CalibrationError("calibration_data holds no token; give text like what the model will see")
    if len(windows) > form.samples:
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(form.seed))
        windows = [windows[index] for index in sorted(chosen[: form.samples].tolist())]
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(window.numel(), []).append(window)
    batches = []
    for same in by_length.values():
        for part in torch.stack(same).split(form.batch_size):
            batches.append(dict.fromkeys(form.argument_names, part))
    return batches


def _tensors(batch: Any) -> Iterable[tuple[str, Tensor]]:
    items = (
        batch.items()
        if isinstance(batch, Mapping)
        else enumerate(batch if isinstance(batch, (list, tuple)) else [batch])
    )
    return ((str(name), value) for name, value in items if isinstance(value, Tensor))


def _count_tokens(batches: Iterable[Any]) -> int:
    return sum(value.numel() for batch in batches for name, value in _tensors(batch) if name == "input_ids")


def content_sha256(batches: Iterable[Any]) -> str:
    """Hex sha256 of the names, dtypes, shapes and bytes of all tensors in ``batches``."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in _tensors(batch):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()

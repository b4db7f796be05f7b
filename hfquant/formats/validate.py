"""Is a checkpoint whole, of one save, and sane? Checked from its files, before anything is allocated."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hfquant.errors import FormatError
from hfquant.formats.headers import Header, StoredTensor
from hfquant.formats.native import SAVE_ID_KEY
from hfquant.nn.packed_module import companion_name
from hfquant.nn.swap import packed_modules
from hfquant.numerics.affine import scale_from_bits
from hfquant.numerics.packing import has_clean_padding, unpack
from hfquant.numerics.residual import LARGEST


SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

FLOATS = {"F64", "F32", "F16", "BF16"}

ValueCheck = Callable[[Tensor], str | None]


@dataclass(frozen=True)
class ExpectedTensor:
    """What the model needs to find under one name.

    Attributes:
        dtypes: Acceptable dtypes, as safetensors names them.
        shape: Sizes.
        check: Returns what is wrong with the values, or ``None``.
    """

    dtypes: frozenset[str]
    shape: tuple[int, ...]
    check: ValueCheck | None = None


def expected_tensors(model: nn.Module) -> dict[str, ExpectedTensor]:
    """What a checkpoint of ``model`` (packed modules in place, on any device) has to hold, by state dict name."""
    special = _value_checks(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    expected = {}
    for name, tensor in model.state_dict().items():
        kind = SAFETENSORS_DTYPES[tensor.dtype]
        # Transformers casts floats to the dtype that was asked for, so any float dtype will do.
        dtypes = frozenset(FLOATS) if kind in FLOATS else frozenset({kind})
        check = special.get(name, _finite if kind in FLOATS and name in parameters else None)
        expected[name] = ExpectedTensor(dtypes, tuple(tensor.shape), check)
    return expected


def _value_checks(model: nn.Module) -> dict[str, ValueCheck | None]:
    checks: dict[str, ValueCheck | None] = {}
    for name, module in packed_modules(model):
        weight_scheme = module.scheme.weight
        signed = weight_scheme.bits == 4 and weight_scheme.symmetric
        for key, weight in module.float_weights.items():
            prefix = f"{name}." if name else ""
            groups = weight_scheme.groups(weight.in_features)
            checks[prefix + key] = _padding_check(weight_scheme.bits, weight.in_features)
            checks[prefix + companion_name(key, "scale")] = _nonzero_scale if signed else _positive_scale
            checks[prefix + companion_name(key, "zero_point")] = _padding_check(weight_scheme.bits, groups)
            checks[prefix + companion_name(key, "input_scale")] = _positive_scale
            checks[prefix + companion_name(key, "residual")] = _residual_check(weight.in_features)
    return checks


def _residual_check(length: int) -> ValueCheck:
    def check(words: Tensor) -> str | None:
        if not has_clean_padding(words, bits=4, length=length):
            return f"bits behind the {length} residuals of a row are set; expected zeros"
        wrong = int((unpack(words, bits=4, length=length) < -LARGEST).sum())
        return f"{wrong} residuals are half a step; expected at most {LARGEST}/16" if wrong else None

    return check


def _padding_check(bits: int, length: int) -> ValueCheck | None:
    if length * bits % 32 == 0:
        return None

    def check(words: Tensor) -> str | None:
        clean = has_clean_padding(words, bits=bits, length=length)
        return None if clean else f"bits behind the {length} codes of a row are set; expected zeros"

    return check


def _finite(values: Tensor) -> str | None:
    if values.numel() == 0 or bool(torch.isfinite(values).all()):
        return None
    return f"{int((~torch.isfinite(values)).sum())} values are NaN or infinite; expected finite numbers"


def _nonzero_scale(bits: Tensor) -> str | None:
    scale = scale_from_bits(bits)
    zeros = int((scale == 0).sum())
    return _finite(scale) or (f"{zeros} scales are zero; expected finite, non-zero scales" if zeros else None)


def _positive_scale(bits: Tensor) -> str | None:
    scale = scale_from_bits(bits)
    wrong = int((scale <= 0).sum())
    return _finite(scale) or (f"{wrong} scales are zero or negative; expected positive scales" if wrong else None)


def check_save_id(headers: Iterable[Header], save_id: Any) -> None:
    """All files must be of the save that wrote ``config.json``.

    Raises:
        FormatError: If the config has no save id, or a file another one.
    """
    if not isinstance(save_id, str) or not save_id:
        raise FormatError(f"quantization_config.save_id={save_id!r}: expected an id; config.json is damaged")
    for header in headers:
        found = header.metadata.get(SAVE_ID_KEY)
        if found != save_id:
            raise FormatError(
                f"{header.file.name} is of another save than config.json (save id {found!r}, expected {save_id!r}): "
                "the save was interrupted, or files of two saves were mixed; save the model again into an empty folder"
            )


def check_tensors(
    found: Mapping[str, StoredTensor],
    expected: Mapping[str, ExpectedTensor],
    *,
    required: Iterable[str],
    allow_extra: bool = False,
) -> None:
    """Compare what the headers describe with what the model needs, by the model's names.

    Raises:
        FormatError: Naming the first tensor that is missing, not expected, or of another dtype or shape.
    """
    for name in required:
        if name not in found:
            raise FormatError(f"{name} is missing from the checkpoint; expected {_describe(expected[name])}")
    for name, stored in found.items():
        if name not in expected:
            if allow_extra:
                continue
            raise FormatError(f"{name} in {stored.file.name} is not a tensor of this model; expected no such tensor")
        want = expected[name]
        if stored.dtype not in want.dtypes or stored.shape != want.shape:
            raise FormatError(
                f"{name} in {stored.file.name}: expected {_describe(want)}, found {stored.dtype} {list(stored.shape)}"
            )


def _describe(want: ExpectedTensor) -> str:
    return f"{' or '.join(sorted(want.dtypes))} {list(want.shape)}"


def check_values(
    found: Mapping[str, StoredTensor], expected: Mapping[str, ExpectedTensor], stored_names: Mapping[str, str]
) -> None:
    """Look at the values of one tensor at a time, mapped from the file, not read into memory.

    Args:
        found: Model name -> what the header describes.
        expected: Model name -> what the model needs.
        stored_names: Model name -> name in the file.

    Raises:
        FormatError: Naming the first tensor with unusable values.
    """
    by_file: dict[Path, list[str]] = {}
    for name, stored in found.items():
        if name in expected and expected[name].check is not None:
            by_file.setdefault(stored.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    _check_tensor(name, tensors.get_tensor(stored_names[name]), expected[name], file)
        except SafetensorError as error:
            raise FormatError(f"{file.name}: {error}; the file is damaged") from error


def _check_tensor(name: str, tensor: Tensor, want: ExpectedTensor, file: Path) -> None:
    assert want.check is not None
    problem = want.check(tensor)
    if problem is not None:
        raise FormatError(f"{name} in {file.name}: {problem}; the file is damaged")


def check_shard_names(files: Iterable[Path], folder: Path | None) -> None:
    """Shards must be plain names inside the folder of the checkpoint.

    Raises:
        FormatError: If a file lies elsewhere or the index names a path.
    """
    for file in files:
        outside = folder is not None and folder.absolute() not in file.absolute().parents
        if ".." in file.parts or outside:
            raise FormatError(f"shard {str(file)!r} lies outside the checkpoint; shard names must be plain file names")
        index = file.parent / "model.safetensors.index.json"
        if folder is not None and file.parent != folder and (folder / index.name).is_file():
            index = folder / index.name
        if file.name != "model.safetensors" and index.is_file():
            _check_index(index)


def _check_index(index: Path) -> None:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index.name}: not a safetensors index ({error!r}); the file is damaged") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise FormatError(f"{index.name}: shard name {name!r} holds a path; shard names must be plain file names")

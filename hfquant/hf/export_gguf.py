"""GGUF export: a Transformers model under llama.cpp's names, block by block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from hfquant.errors import ConfigError, SchemeError
from hfquant.formats.gguf import BYTES, FILE_TYPES, block_type, blocks, check_block_type, interleave_heads
from hfquant.formats.gguf_tokenizer import tokenizer_fields
from hfquant.formats.stored_weight import StoredWeight
from hfquant.hf.source import QuantizedSource


ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` -> architecture of llama.cpp."""

DENSE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

NUMPY_TYPES = {"F32": "float32", "F16": "float16", "BF16": "uint16"}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name, shape in weights, type, and what it is made from."""

    name: str
    shape: tuple[int, ...]
    kind: str
    heads: int | None


def import_gguf() -> Any:
    """The ``gguf`` package.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF needs the package gguf: pip install 'hfquant[gguf]'") from error
    return gguf


def write_gguf(
    source: QuantizedSource, folder: Path, dtype: torch.dtype, *, name: str, progress: bool
) -> tuple[dict[str, str], list[str]]:
    """Write ``<name>-<type>.gguf`` into ``folder``, one tensor in memory at a time.

    Args:
        source: The quantized model.
        folder: Where.
        dtype: Of weights that are not quantized; vectors are float32.
        name: Of the model, for the file and ``general.name``.
        progress: Show a progress bar.

    Returns:
        Quantized weight, by its name in GGUF -> block type, and notes.

    Raises:
        ConfigError: If llama.cpp has no such architecture, or the package gguf is missing.
        SchemeError: If a weight has no exact block.
        FormatError: If the tokenizer cannot be written.
    """
    gguf, config = import_gguf(), source.model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ConfigError(
            f"model_type {config.model_type!r} cannot be written to GGUF; known: {', '.join(sorted(ARCHITECTURES))}. "
            "Convert the dense or compressed-tensors export with llama.cpp's convert_hf_to_gguf.py"
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    entries = [_entry(item, names, config, architecture, dtype) for item in _items(source, dtype)]
    types = {entry.name: entry.kind for entry in entries if entry.kind in BYTES}
    linear = [kind for name, kind in types.items() if name.startswith("blk.")] or [DENSE_TYPES[dtype]]
    main = max(set(linear), key=linear.count)
    fields = _model_fields(config, architecture, name, main) | _tokenizer(source, config)
    frequencies = rope_factors(config)
    if frequencies is not None:
        entries.append(_Entry("rope_freqs.weight", frequencies.shape, "F32", None))
    writer = gguf.GGUFWriter(folder / f"{name}-{main}.gguf", architecture)
    try:
        _write_head(writer, gguf, fields, entries)
        items = tqdm(_items(source, dtype), total=len(entries), desc="Exporting", unit="tensor", disable=not progress)
        for entry, item in zip(entries, items, strict=False):
            writer.write_tensor_data(_data(entry, item))
        if frequencies is not None:
            writer.write_tensor_data(frequencies)
    finally:
        writer.close()
    return types, _notes(source)


def _write_head(writer: Any, gguf: Any, fields: dict[str, Any], entries: list[_Entry]) -> None:
    for key, value in fields.items():
        _add(writer, gguf, key, value)
    for entry in entries:
        last = entry.shape[-1] // 32 * BYTES[entry.kind] if entry.kind in BYTES else entry.shape[-1]
        stored = np.dtype(NUMPY_TYPES.get(entry.kind, "uint8"))
        shape, size = (*entry.shape[:-1], last), math.prod(entry.shape[:-1]) * last * stored.itemsize
        writer.add_tensor_info(entry.name, shape, stored, size, gguf.GGMLQuantizationType[entry.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _items(source: QuantizedSource, dtype: torch.dtype) -> Iterator[StoredWeight | tuple[str, Tensor]]:
    """The tensors of ``source``; tables that no block holds become dense."""
    for item in source.stream():
        table = isinstance(item, StoredWeight) and item.kind in ("embedding", "head")
        if isinstance(item, StoredWeight) and table and block_type(item) is None:
            yield item.name, item.values(dtype)
        else:
            yield item


def _entry(
    item: StoredWeight | tuple[str, Tensor], names: Any, config: Any, architecture: str, dtype: torch.dtype
) -> _Entry:
    own = item.name if isinstance(item, StoredWeight) else item[0]
    name = names.get_name(own, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise SchemeError(f"{own} has no name in llama.cpp's {architecture} architecture")
    heads = None
    if architecture == "llama" and own.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if ".q_proj." in own else config.num_key_value_heads
    if isinstance(item, StoredWeight):
        return _Entry(name, item.float_weight.shape, check_block_type(item), heads)
    kind = "F32" if item[1].ndim == 1 else DENSE_TYPES[dtype]
    return _Entry(name, tuple(item[1].shape), kind, heads)


def _data(entry: _Entry, item: StoredWeight | tuple[str, Tensor]) -> NDArray[Any]:
    rows: NDArray[Any]
    if isinstance(item, StoredWeight):
        rows = blocks(item)
    elif entry.kind == "BF16":
        rows = item[1].to(torch.bfloat16).view(torch.uint16).numpy()
    else:
        rows = item[1].to(torch.float32 if entry.kind == "F32" else torch.float16).numpy()
    return np.ascontiguousarray(rows if entry.heads is None else interleave_heads(rows, entry.heads))


def _model_fields(config: Any, architecture: str, name: str, main: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    if rope.get("rope_type") == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif rope.get("rope_type", "default") not in ("default", "llama3"):
        raise SchemeError(f"rope_type {rope['rope_type']!r} cannot be written to GGUF; known: default, linear, llama3")
    general = {"type": "model", "name": name, "file_type": FILE_TYPES[main], "quantization_version": 2}
    return {f"general.{key}": value for key, value in general.items()} | {
        f"{architecture}.{key}": value for key, value in own.items()
    }


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """By how much Llama 3 slows each rotary frequency ``[head_dim / 2]``; ``None`` for other models.

    References:
        Grattafiori et al. 2024, The Llama 3 herd of models. https://arxiv.org/abs/2407.21783
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    factors: NDArray[np.float32] = (1 / (smooth.clamp(0, 1) * (1 - 1 / factor) + 1 / factor)).float().numpy()
    return factors


def _tokenizer(source: QuantizedSource, config: Any) -> dict[str, Any]:
    if source.folder is None or not (source.folder / "tokenizer.json").is_file():
        return {"tokenizer.ggml.model": "none"}
    return tokenizer_fields(source.folder, config.vocab_size)


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    if key.endswith("token_type"):
        writer.add_token_types(value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
        writer.add_key_value(key, value, kind)


def _notes(source: QuantizedSource) -> list[str]:
    notes = []
    schemes = source.quantizer.selection.schemes.values()
    if any(scheme.activation is not None for scheme in schemes):
        notes.append("GGUF holds weights only: llama.cpp quantizes activations its own way, 32 values to a scale")
    if source.folder is None or not (source.folder / "tokenizer.json").is_file():
        notes.append(
            "no tokenizer.json was found: the file holds no vocabulary; export a saved checkpoint that has one"
        )
    return notes

"""The native checkpoint, version 1.

A folder with ``config.json`` and ``model.safetensors`` (or shards ``model-0000i-of-0000n.safetensors`` with
``model.safetensors.index.json``), as Transformers writes it. Only JSON and safetensors are ever read.

``config.json`` holds under ``quantization_config``:

    quant_method     "hfquant"
    format_version   1; a reader refuses a newer one and says which hfquant it needs
    hfquant_version  the hfquant that wrote it
    modules          module name -> scheme, as in "int4-g64" or "int8-channel-dynamic": every quantized module
    save_id          32 hex digits that stand in every shard too; shards of another save are refused
    ...              the user's fields (quantization_bits, quantization_type, ...), for reports

Each quantized module has the tensors that ``nn/packed_module.py`` lists, in the layout of ``numerics/packing.py``,
under the names of the model's own state dict. Every other tensor stands under its usual name.

The metadata of every shard (strings) holds:

    format            "pt"
    hfquant_save_id   as in config.json
    hfquant_sha256    JSON: tensor name -> sha256 of its bytes, for the tensors of all shards, for `hfquant verify`

The save id is the first half of the sha256 of that JSON: equal content has an equal id, whoever wrote it and whenever.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import FormatError


FORMAT_VERSION = 1

SAVE_ID_KEY = "hfquant_save_id"
SHA256_KEY = "hfquant_sha256"


def content_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Safetensors metadata for a checkpoint that holds ``tensors``.

    Tensors that are not in memory (on the meta device, offloaded or sharded over processes) cannot be hashed; the save
    id is then random and no sha256 is recorded.
    """
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta for tensor in tensors.values()):
        return {SAVE_ID_KEY: uuid.uuid4().hex}
    return digest_metadata({name: tensor_sha256(tensor) for name, tensor in tensors.items()})


def digest_metadata(digests: Mapping[str, str]) -> dict[str, str]:
    """Safetensors metadata for a checkpoint whose tensors have these sha256."""
    text = json.dumps(dict(sorted(digests.items())), separators=(",", ":"))
    return {SAVE_ID_KEY: hashlib.sha256(text.encode()).hexdigest()[:32], SHA256_KEY: text}


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of the bytes of ``tensor`` as safetensors stores them."""
    data = tensor.detach().cpu().contiguous()
    if data.numel() == 0:
        return hashlib.sha256(b"").hexdigest()
    flat = data.reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def check_format_version(version: Any, written_by: Any) -> None:
    """Refuse a checkpoint of an unknown format version.

    Args:
        version: ``format_version`` of the checkpoint.
        written_by: ``hfquant_version`` of the checkpoint.

    Raises:
        FormatError: If ``version`` is not one this hfquant reads.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatError(
            f"quantization_config.format_version={version!r}: expected an integer from 1 to {FORMAT_VERSION}; "
            "config.json is damaged or was not written by hfquant"
        )
    if version > FORMAT_VERSION:
        raise FormatError(
            f"the checkpoint has format version {version}, this hfquant reads up to {FORMAT_VERSION}; "
            f"it needs hfquant {written_by} or newer: pip install -U hfquant"
        )

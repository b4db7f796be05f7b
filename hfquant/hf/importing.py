"""``import_model``: compressed-tensors and GPTQ checkpoints in hfquant's own format, codes unchanged."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfquant.errors import ConfigError, FormatError, SchemeError
from hfquant.formats import compressed_tensors, gptq
from hfquant.formats.headers import read_headers
from hfquant.formats.native import SAVE_ID_KEY, digest_metadata, tensor_sha256
from hfquant.formats.shards import ShardWriter, parse_size
from hfquant.formats.staging import staged_folder
from hfquant.hf.checkpoint import model_name
from hfquant.hf.companions import copy_companion_files
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.source import checkpoint_files, local_folder, skeleton
from hfquant.numerics.affine import scale_from_bits, scale_to_bits
from hfquant.numerics.packing import pack
from hfquant.schemes import LayerScheme


SUFFIXES = {
    compressed_tensors.QUANT_METHOD: (
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
        "input_scale",
    ),
    gptq.QUANT_METHOD: ("qweight", "qzeros", "scales", "g_idx"),
}


@dataclass(frozen=True)
class ImportReport:
    """What ``import_model`` wrote.

    Attributes:
        folder: Where; ``from_pretrained`` loads it.
        schemes: Quantized module -> scheme.
        largest_rounding: Of the scales, relative to each; 0 if none was rounded.
    """

    folder: str
    schemes: dict[str, str]
    largest_rounding: float


def import_model(
    model: str | Path,
    output: str | Path,
    *,
    round_scales: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    **hub: Any,
) -> ImportReport:
    """Rewrite a compressed-tensors or GPTQ checkpoint as one of hfquant, so that it runs on its kernels and fine-tunes.

    Args:
        model: Folder, or name on the Hub.
        output: New folder for the native checkpoint.
        round_scales: hfquant keeps scales in bfloat16. Float16 and float32 scales that it cannot hold are refused,
            unless this allows rounding them to the nearest (at most 0.4 %).
        max_shard_size: Largest weight file.
        progress: Show a progress bar.
        **hub: ``revision`` and ``token`` for a name on the Hub.

    Raises:
        ConfigError: If the checkpoint is of another kind.
        SchemeError: If it holds what hfquant does not compute, or a scale that bfloat16 cannot hold.
        FormatError: If it is damaged.
    """
    folder = local_folder(model, **hub)
    job = _Import(folder, round_scales=round_scales)
    with job.files, staged_folder(Path(output)) as target:
        digests = {name: tensor_sha256(tensor) for name, tensor in tqdm(job, desc="Reading", disable=not progress)}
        metadata = digest_metadata(digests)
        writer = ShardWriter(target, parse_size(max_shard_size), metadata)
        for name, tensor in tqdm(job, desc="Importing", total=len(digests), disable=not progress):
            writer.add(name, tensor)
        writer.close()
        _write_config(job, target, metadata[SAVE_ID_KEY])
        copy_companion_files(folder, target)
        if (folder / "generation_config.json").is_file():
            text = (folder / "generation_config.json").read_text(encoding="utf-8")
            (target / "generation_config.json").write_text(text, encoding="utf-8")
    schemes = {name: str(scheme) for name, scheme in job.schemes.items()}
    return ImportReport(str(output), schemes, job.largest_rounding)


class _Import:
    """One checkpoint, as the tensors of the native one."""

    def __init__(self, folder: Path, *, round_scales: bool) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = self.config.get("quantization_config") or {}
        self.method = str(fields.get("quant_method"))
        if self.method not in SUFFIXES:
            raise ConfigError(f"{folder}: quant_method={self.method!r}: expected one of {', '.join(SUFFIXES)}")
        self.fields, self.round_scales, self.largest_rounding = fields, round_scales, 0.0
        self.model: PreTrainedModel = skeleton(folder)
        self.modules = dict(self.model.named_modules())
        self.files = ExitStack()
        self.schemes: dict[str, LayerScheme] = {}
        self.plain, self.layers = self._sorted(checkpoint_files(folder))
        self._check_complete()

    def _sorted(self, files: list[Path]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, dict[str, Any]]]:
        plain: dict[str, Callable[[], Tensor]] = {}
        layers: dict[str, dict[str, Any]] = {}
        for file, header in read_headers(files).items():
            stored = self.files.enter_context(safe_open(file, framework="pt"))
            for name, entry in header.tensors.items():
                module, _, key = name.rpartition(".")
                own = model_name(module, self.modules, self.model.base_model_prefix)
                if key in SUFFIXES[self.method] or entry.dtype == "I8":
                    if own is None or not isinstance(self.modules[own], nn.Linear):
                        raise SchemeError(
                            f"{name} belongs to no linear layer of this model (fused experts cannot be imported)"
                        )
                    layers.setdefault(own, {})[key] = partial(stored.get_tensor, name)
                else:
                    plain[name if own is None else f"{own}.{key}"] = partial(stored.get_tensor, name)
        return plain, layers

    def _check_complete(self) -> None:
        tied = self.model.all_tied_weights_keys or {}
        quantized = {f"{name}.weight" for name in self.layers}
        for name in self.model.state_dict():
            if name not in self.plain and name not in quantized and name not in tied:
                raise FormatError(f"{name} is missing from the checkpoint")
        if not self.layers:
            raise FormatError("the checkpoint holds no quantized layer")

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tied = self.model.all_tied_weights_keys or {}
        for name, read in self.plain.items():
            if name not in tied:
                yield name, read()
        for name, tensors in self.layers.items():
            yield from self._layer(name, {key: read() for key, read in tensors.items()})

    def _layer(self, name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        module = self.modules[name]
        assert isinstance(module, nn.Linear)
        shape = (module.out_features, module.in_features)
        if self.method == gptq.QUANT_METHOD:
            scheme = gptq.read_scheme(self.fields)
            old = self.fields.get("checkpoint_format", self.fields.get("format", "gptq")) != "gptq_v2"
            found = gptq.read_layer(name, tensors, scheme, shape, version=1 if old else 2)
        else:
            scheme = self._scheme(name, tensors, shape)
            found = compressed_tensors.read_layer(name, tensors, scheme, shape)
        self.schemes[name], bits = scheme, scheme.weight.bits
        yield f"{name}.weight", pack(found["codes"].contiguous(), bits=bits)
        yield f"{name}.weight_scale", self._scale_bits(f"{name} (scales)", found["scale"], bits=bits)
        if found["zero_point"] is not None:
            yield f"{name}.weight_zero_point", pack(found["zero_point"].contiguous(), bits=bits)
        if scheme.quantization_type == "static":
            if found["input_scale"] is None:
                raise FormatError(f"{name}.input_scale is missing; the scheme has static activations")
            yield f"{name}.input_scale", self._scale_bits(f"{name}.input_scale", found["input_scale"].view(1), bits=8)

    def _scheme(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LayerScheme:
        """The group of the config that names the layer or, without any regular expression, fits its tensors."""
        groups = compressed_tensors.read_schemes(self.fields)
        named = [scheme for scheme, targets in groups if name in targets]
        scale = tensors.get("weight_scale")
        fitting = {
            scheme
            for scheme, _ in groups
            if scale is not None
            and (scheme.weight.group_size or shape[1]) * scale.shape[-1] == shape[1]
            and (
                "weight_packed" not in tensors
                or tensors["weight_packed"].shape[-1] == -(-shape[1] * scheme.weight.bits // 32)
            )
        }
        if named or len(fitting) == 1:
            return named[0] if named else fitting.pop()
        raise FormatError(f"{name}: {len(fitting)} groups of quantization_config fit its tensors; expected exactly one")

    def _scale_bits(self, name: str, scale: Tensor, *, bits: int) -> Tensor:
        wanted = scale.float()
        if (
            not bool(torch.isfinite(wanted).all())
            or bool((wanted == 0).any())
            or (bits == 8 and bool((wanted < 0).any()))
        ):
            raise FormatError(f"{name}: zero, negative or not finite; expected positive finite scales")
        found = scale_to_bits(wanted)
        error = float(((scale_from_bits(found) - wanted).abs() / wanted.abs()).max()) if wanted.numel() else 0.0
        if error and not self.round_scales:
            raise SchemeError(
                f"{name}: {scale.dtype} values that bfloat16, in which hfquant keeps scales, cannot hold (off by up to "
                f"{100 * error:.2g} %); pass round_scales=True to take the nearest, or dequantize and quantize again"
            )
        self.largest_rounding = max(self.largest_rounding, error)
        return found.contiguous()


def _write_config(job: _Import, target: Path, save_id: str) -> None:
    """``config.json`` of the native checkpoint; the settings are those of most layers."""
    common: LayerScheme = Counter(job.schemes.values()).most_common(1)[0][0]
    config = HfQuantConfig(
        quantization_bits=common.weight.bits,
        quantization_type=common.quantization_type,
        group_size=common.weight.group_size or -1,
        symmetric=common.weight.symmetric,
        embedding_bits=16,
    )
    config.freeze({name: str(scheme) for name, scheme in job.schemes.items()}, version("hfquant"))
    config.save_id = save_id
    fields = job.config | {"quantization_config": config.to_dict()}
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

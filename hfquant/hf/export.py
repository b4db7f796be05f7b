"""``export_model``: a quantized checkpoint in the formats that other engines serve, codes unchanged."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from hfquant.errors import ConfigError, SchemeError
from hfquant.formats import compressed_tensors, gptq
from hfquant.formats.engines import LinearLayer, check_engine
from hfquant.formats.shards import ShardWriter, file_sha256, parse_size
from hfquant.formats.staging import staged_folder
from hfquant.formats.stored_weight import StoredWeight
from hfquant.hf.companions import copy_companion_files
from hfquant.hf.export_gguf import write_gguf
from hfquant.hf.roles import model_roles
from hfquant.hf.source import QuantizedSource, open_source
from hfquant.hf.verify import EXPORT_RECORD
from hfquant.nn.packed_module import FloatWeight, PackedModule
from hfquant.nn.quant_experts import QuantExperts
from hfquant.nn.quant_linear import QuantLinear
from hfquant.numerics.metrics import sqnr_db
from hfquant.numerics.packing import PackedWeight
from hfquant.schemes import LayerScheme


FORMATS = ("compressed-tensors", "gptq", "gguf", "dense")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ExportReport:
    """What ``export_model`` wrote.

    Attributes:
        format: One of ``FORMATS``.
        folder: Where.
        schemes: Quantized layer, by its name in the checkpoint -> scheme.
        dense: Weight that is quantized in the original and dense in the export -> reason.
        notes: What the user should know.
        file_bytes: Size of the weight files.
    """

    format: str
    folder: str
    schemes: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    file_bytes: int = 0


class Target(Protocol):
    """A file format, as the loop over the tensors sees it."""

    def dense_reason(self, weight: StoredWeight) -> str | None:
        """Why ``weight`` has no place in the format; ``None`` if it has."""

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        """What stands for ``weight``, by the names behind the module's own."""

    def config(self, schemes: Mapping[str, LayerScheme], kept: list[str]) -> dict[str, Any] | None:
        """``quantization_config`` for ``config.json``."""


@dataclass
class CompressedTensorsTarget:
    """compressed-tensors; ``engine`` decides how INT4 weights with INT8 activations are stored.

    Attributes:
        dtype: Of what is stored dense.
        engine: What will read it.
        integer_activations: Whether layers of the model have INT8 activations.
    """

    dtype: torch.dtype
    engine: str | None = None
    integer_activations: bool = False

    @property
    def bytes_for_int4(self) -> bool:
        """Whether INT4 layers take a byte a code: on CPUs vLLM silently ignores the activations of packed ones."""
        return self.engine == "vllm"

    def dense_reason(self, weight: StoredWeight) -> str | None:
        """Linear layers and experts have a place."""
        if weight.kind == "experts" and self.engine == "transformers" and weight.scheme.activation is not None:
            return "Transformers cannot load fused experts with INT8 activations"
        is_fallback = self.integer_activations and weight.scheme.activation is None
        if is_fallback and self.engine == "vllm" and weight.kind == "linear" and weight.scheme.weight.bits == 8:
            return "vLLM on a CPU has no kernel for 8-bit weights with 16-bit activations, and few layers need them"
        return _no_place(weight, experts=True)

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        """See ``formats/compressed_tensors.py``."""
        return compressed_tensors.layer_tensors(weight, self.dtype, bytes_for_int4=self.bytes_for_int4)

    def config(self, schemes: Mapping[str, LayerScheme], kept: list[str]) -> dict[str, Any]:
        """See ``formats/compressed_tensors.py``."""
        return compressed_tensors.quantization_config(schemes, kept, bytes_for_int4=self.bytes_for_int4)


@dataclass
class GptqTarget:
    """GPTQ, version 1 for symmetric weights and version 2 for others unless one is given."""

    version: int

    def dense_reason(self, weight: StoredWeight) -> str | None:
        """Linear layers have a place."""
        return _no_place(weight, experts=False)

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        """See ``formats/gptq.py``."""
        return gptq.layer_tensors(weight, version=self.version)

    def config(self, schemes: Mapping[str, LayerScheme], kept: list[str]) -> dict[str, Any]:
        """See ``formats/gptq.py``; all layers must share one scheme."""
        if len(set(schemes.values())) > 1:
            found = ", ".join(sorted({str(scheme) for scheme in schemes.values()}))
            raise SchemeError(f"GPTQ holds one scheme, the model has {found}; export to compressed-tensors")
        written_by = f"hfquant:{version('hfquant')}"
        return gptq.quantization_config(next(iter(schemes.values())), kept, version=self.version, written_by=written_by)


class DenseTarget:
    """The float model that the codes stand for."""

    def dense_reason(self, weight: StoredWeight) -> str:
        """Everything is dense."""
        return "asked for"

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        """Never called."""
        raise NotImplementedError

    def config(self, schemes: Mapping[str, LayerScheme], kept: list[str]) -> None:
        """No quantization."""
        return


def _no_place(weight: StoredWeight, *, experts: bool) -> str | None:
    if weight.kind == "embedding":
        return "the format has no quantized embeddings"
    if weight.kind == "head":
        return "engines read the output head as a dense table"
    if weight.float_weight.transposed:
        return "the layer keeps its weight transposed (Conv1D or transposed experts)"
    return None if experts or weight.kind != "experts" else "the format has no fused experts"


def export_model(
    model: PreTrainedModel | str | Path,
    format: str,
    output: str | Path,
    *,
    engine: str | None = None,
    dtype: str | None = None,
    tensor_parallel: int = 1,
    gptq_version: int | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    **hub: Any,
) -> ExportReport:
    """Write a model quantized by hfquant in a format that other engines serve.

    A checkpoint on disk is read tensor by tensor; no float model is ever in memory. Codes are copied or repacked, never
    computed again; scales are exact in the dtype of the target or the export is refused.

    Args:
        model: Model quantized by hfquant, the folder of its checkpoint, or its name on the Hub.
        format: ``"compressed-tensors"``, ``"gptq"``, ``"gguf"`` or ``"dense"``.
        output: New folder; replaced as a whole if it holds a checkpoint.
        engine: Check what ``"vllm"``, ``"sglang"``, ``"transformers"`` or ``"llama.cpp"`` can run, first.
        dtype: Of everything that is stored dense: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default as the model.
        tensor_parallel: Devices that will share each layer, for the checks.
        gptq_version: 1 or 2; default 1 for symmetric weights, 2 for others.
        max_shard_size: Largest weight file.
        progress: Show a progress bar.
        **hub: ``revision`` and ``token`` for a name on the Hub.

    Returns:
        What was written, and what had to become dense.

    Raises:
        ConfigError: For an unknown format or engine, or a model that hfquant did not quantize.
        SchemeError: If the format or the engine cannot hold the model exactly; says which option would work.
        FormatError: If the checkpoint is damaged.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    source = open_source(model, **hub)
    with source.files, staged_folder(Path(output)) as folder:
        layers = linear_layers(source.model)
        if engine is not None:
            heads = getattr(source.model.config, "num_attention_heads", None)
            check_engine(engine, format, layers, tensor_parallel=tensor_parallel, attention_heads=heads)
        report = ExportReport(format, str(output))
        wanted = DTYPES[dtype] if dtype else None
        if format == "gguf":
            _write_gguf(source, folder, report, wanted or source.model.dtype, progress=progress)
            return report
        target = _target(format, engine, gptq_version, layers, wanted or source.model.dtype)
        job = _Job(source, target, folder, report, wanted)
        job.write(parse_size(max_shard_size), progress=progress)
    return report


def _write_gguf(
    source: QuantizedSource, folder: Path, report: ExportReport, dtype: torch.dtype, *, progress: bool
) -> None:
    name = Path(source.model.config.name_or_path or "model").name or "model"
    report.schemes, report.notes = write_gguf(source, folder, dtype, name=name, progress=progress)
    write_configs(source, folder, None, dtype)
    report.file_bytes = sum(file.stat().st_size for file in folder.glob("*.gguf"))
    write_record(folder, report)


def _target(
    format: str, engine: str | None, gptq_version: int | None, layers: Mapping[str, LinearLayer], dtype: torch.dtype
) -> Target:
    if format == "compressed-tensors":
        integers = any(layer.scheme is not None and layer.scheme.activation is not None for layer in layers.values())
        return CompressedTensorsTarget(dtype, engine, integers)
    if format == "gptq":
        symmetric = all(layer.scheme.weight.symmetric for layer in layers.values() if layer.scheme)
        if gptq_version not in (None, 1, 2):
            raise ConfigError(f"gptq_version={gptq_version!r}: expected 1 or 2")
        return GptqTarget(gptq_version or (1 if symmetric else 2))
    return DenseTarget()


class _Job:
    """One export: the loop over the tensors of a source."""

    def __init__(
        self, source: QuantizedSource, target: Target, folder: Path, report: ExportReport, dtype: torch.dtype | None
    ) -> None:
        self.source, self.target, self.folder, self.report, self.dtype = source, target, folder, report, dtype
        self.original = original_names(source.model)
        self.modules = dict(source.model.named_modules())
        self.kept = {self._module_name(name) for name in float_linears(source.model)}
        self.schemes: dict[str, LayerScheme] = {}

    def write(self, max_bytes: int, *, progress: bool) -> None:
        """Write weights, configs, companions and the record of hashes."""
        writer, source = ShardWriter(self.folder, max_bytes), self.source
        for item in tqdm(source.stream(), total=source.items, desc="Exporting", unit="tensor", disable=not progress):
            found = self._packed(item) if isinstance(item, StoredWeight) else self._plain(*item)
            for name, tensor in found:
                writer.add(name, tensor)
        writer.close()
        if not self.schemes and not isinstance(self.target, DenseTarget):
            reasons = "; ".join(sorted(set(self.report.dense.values())))
            raise SchemeError(f"nothing of this model has a place in {self.report.format}: {reasons}")
        self.report.schemes = {name: str(scheme) for name, scheme in self.schemes.items()}
        self.report.file_bytes = writer.total_bytes
        write_configs(source, self.folder, self.target.config(self.schemes, sorted(self.kept)), self.dtype)
        write_record(self.folder, self.report)

    def _module_name(self, name: str) -> str:
        """Name of a module in the checkpoint."""
        (final,) = self.original(f"{name}.weight", torch.empty(1, 1, device="meta"))
        return final.removesuffix(".weight")

    def _plain(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        module_name, _, key = name.rpartition(".")
        if key == "weight" and tensor.ndim == 2 and not isinstance(self.modules.get(module_name), nn.Embedding):
            self.kept.add(self._module_name(module_name))  # routers are linear layers in other engines
        cast = tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor
        yield from self.original(name, cast).items()

    def _packed(self, weight: StoredWeight) -> Iterator[tuple[str, Tensor]]:
        parts = list(self._parts(weight))
        reason = self.target.dense_reason(weight)
        if reason is None and any(part.packed.weight.ndim != 2 for part in parts):
            reason = "Transformers has no names for the single experts of this model"
        if reason is not None:
            self.report.dense[weight.name] = reason
            values = weight.values(self.dtype or self.source.model.dtype)
            self._note_rounding(weight, values)
            # In compressed-tensors checkpoints Transformers takes single experts for packed ones.
            fused = weight.kind == "experts" and getattr(self.target, "engine", None) == "transformers"
            dense = {weight.name: values} if fused else self.original(weight.name, values)
            self.kept |= {name.removesuffix(".weight") for name in dense if weight.kind != "embedding"}
            yield from dense.items()
            return
        for part in parts:
            self.schemes[part.module] = part.scheme
            yield from ((f"{part.module}.{name}", tensor) for name, tensor in self.target.tensors(part).items())

    def _note_rounding(self, weight: StoredWeight, values: Tensor) -> None:
        """Say what a narrower dtype than that of the model costs."""
        if self.dtype is None or self.dtype.itemsize >= self.source.model.dtype.itemsize:
            return
        self.report.notes.append(
            f"{weight.name} was rounded to {str(self.dtype).removeprefix('torch.')} (signal to noise "
            f"{sqnr_db(weight.values(torch.float32), values):.1f} dB); hfquant export --evaluate FILE measures the KL"
        )

    def _parts(self, weight: StoredWeight) -> Iterator[StoredWeight]:
        """The single layers, as the checkpoint of the float model names them: experts are stored one by one.

        Rows are all that is ever split, so words and scales are split like the weights they stand for.
        """
        found = [{} if tensor is None else self.original(weight.name, tensor) for tensor in weight.packed]
        for name, words in found[0].items():
            packed = PackedWeight(words, found[1][name], found[2].get(name))
            shape = (*words.shape[:-1], weight.float_weight.in_features)
            yield replace(weight, name=name, float_weight=FloatWeight(shape), packed=packed)


def original_names(model: PreTrainedModel) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """A function from a tensor and its name in ``model`` to the tensors and names of the published checkpoint."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    # What the conversion reads of a model; the model itself says that nothing is to be converted.
    stand_in: Any = SimpleNamespace(_weight_conversions=conversions or None, config=model.config)

    def original(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return revert_weight_conversion(stand_in, {name: tensor}) if conversions else {name: tensor}

    return original


def float_linears(model: PreTrainedModel) -> list[str]:
    """Linear layers that are dense in every export: those in float, and output heads."""
    roles, ties = model_roles(model), model.hf_quantizer.selection.ties
    tables = {*roles.heads, *ties, *ties.values()}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in linears if name in tables or not isinstance(module, PackedModule)]


def linear_layers(model: PreTrainedModel) -> dict[str, LinearLayer]:
    """All linear layers of ``model`` but output heads, and its fused experts, by name."""
    heads, layers = model_roles(model).heads, {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantExperts)) and name not in heads:
            for key, weight in module.float_weights.items():
                own = name if key == "weight" else f"{name}.{key}"
                layers[own] = LinearLayer(module.scheme, weight.shape[-2], weight.shape[-1])
        elif isinstance(module, nn.Linear) and name not in heads:
            layers[name] = LinearLayer(None, module.out_features, module.in_features)
    return layers


def write_configs(
    source: QuantizedSource, folder: Path, quantization: dict[str, Any] | None, dtype: torch.dtype | None
) -> None:
    """Write ``config.json`` and what travels with the weights."""
    config = copy.deepcopy(source.model.config)
    config.__dict__.pop("quantization_config", None)
    config.__dict__.pop("_is_quantized", None)
    fields = json.loads(config.to_json_string())
    fields["architectures"] = [type(source.model).__name__]
    fields["dtype"] = str(dtype or source.model.dtype).removeprefix("torch.")
    if quantization is not None:
        fields["quantization_config"] = quantization
    _write_json(folder / "config.json", fields)
    if quantization is not None and quantization["quant_method"] == gptq.QUANT_METHOD:
        _write_json(folder / "quantize_config.json", quantization)
    if source.model.can_generate():
        source.model.generation_config.save_pretrained(folder)
    if source.folder is not None:
        copy_companion_files(source.folder, folder)
        if (source.folder / "generation_config.json").is_file():
            shutil.copyfile(source.folder / "generation_config.json", folder / "generation_config.json")


def write_record(folder: Path, report: ExportReport) -> None:
    """Write what was exported and the sha256 of every file that matters to the result, for ``hfquant verify``."""
    files = sorted(file for pattern in ("*.safetensors", "*.gguf", "*.json") for file in folder.glob(pattern))
    _write_json(
        folder / EXPORT_RECORD,
        {
            "hfquant_version": version("hfquant"),
            "format": report.format,
            "dense": report.dense,
            "sha256": {file.name: file_sha256(file) for file in files},
        },
    )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

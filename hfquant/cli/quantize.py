"""``hfquant quantize``: a float checkpoint to a quantized one."""

import math
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from hfquant.cli.config_file import load_config_file
from hfquant.cli.models import check_output, folder_bytes, load_language_model, load_model, read_config
from hfquant.cli.output import print_result
from hfquant.cli.text import load_tokenizer, read_text, text_tokens
from hfquant.errors import CalibrationError, ConfigError
from hfquant.evaluation.report import measure_quality
from hfquant.formats.headers import canonicalize_header
from hfquant.formats.quality_report import write_report
from hfquant.formats.resume import ResumeFolder, run_fingerprint
from hfquant.formats.staging import staged_folder
from hfquant.hf.companions import copy_companion_files
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.info import QuantizationInfo, activation_shares, get_quantization_info
from hfquant.hf.plan import peak_process_bytes
from hfquant.hf.quantize import quantize_model_ptq
from hfquant.ptq.layer_result import LayerResult
from hfquant.ptq.quantize_matrix import CALIBRATED


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a float model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the quantized model.")],
    bits: Annotated[int | None, typer.Option(help="Bits of the weights: 8 or 4.")] = None,
    type: Annotated[str | None, typer.Option(help="weight_only, dynamic or static.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1: one per channel.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Without zero points.")] = None,
    activation_symmetric: Annotated[
        bool | None,
        typer.Option("--activation-symmetric/--activation-asymmetric", help="Dynamic ones without zero points."),
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="gptq, signround, awq, search or rtn.")] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="Embedding and head: 8, 4, or 16 for float.")] = None,
    target_bits: Annotated[float | None, typer.Option(help="Choose bits and group per layer: this average.")] = None,
    target_size: Annotated[str | None, typer.Option(help="Choose them for a size: 90MB.")] = None,
    target_error: Annotated[float | None, typer.Option(help="Choose them for an estimated mean KL.")] = None,
    backend: Annotated[str | None, typer.Option(help="hfquant or bitsandbytes.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Module to keep in float; repeat for more.")] = None,
    keep_residual: Annotated[bool | None, typer.Option("--keep-residual", help="For fine-tuning: 4 bits more.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Fail if a linear layer would stay float.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with these settings.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on.")] = None,
    calibration_batches: Annotated[int | None, typer.Option(min=1, help="Windows to calibrate on (128).")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Of signround (200).")] = None,
    evaluate: Annotated[Path | None, typer.Option(help="Text file: measure quality on it, for the report.")] = None,
    evaluate_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to measure on.")] = 8192,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything that is chosen at random.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays float: auto, float32, bfloat16, float16.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize MODEL and save it. Weights are quantized one by one while they are read."""
    given = dict(locals())
    output = check_output(output, model, overwrite=overwrite)
    fields: dict[str, Any] = {} if config is None else load_config_file(config)
    fields |= {FIELDS[name]: value for name, value in given.items() if name in FIELDS and value not in (None, [])}
    summary = _run(model, output, fields, given)
    print_result(summary, as_json=json, title=f"{model} -> {output}")


def _run(model: str, output: Path, fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Quantize, report and save; what is finished lies on disk at any time, and is cleared away in the end."""
    started, settings, calibration = time.perf_counter(), HfQuantConfig(**fields), given["calibration"]
    _check_request(model, settings, calibration)
    resume = _resume_folder(model, output, fields, given["dtype"], calibration)
    quantized = _load_quantized(model, settings, given["dtype"], calibration, resume)
    report = quality_report(quantized, model, time.perf_counter() - started)
    if given["evaluate"] is not None:
        report["quality"] = _quality(model, quantized, given["evaluate"], given["evaluate_tokens"])
    _save(quantized, output, model, report, given["max_shard_size"])
    summary = _summary(quantized, output, time.perf_counter() - started)
    del quantized  # its weights are mapped from what is removed now, which not every system allows
    resume.remove()
    return summary


FIELDS = {
    "bits": "quantization_bits",
    "type": "quantization_type",
    "group_size": "group_size",
    "symmetric": "symmetric",
    "activation_symmetric": "activation_symmetric",
    "algorithm": "algorithm",
    "embedding_bits": "embedding_bits",
    "target_bits": "target_bits",
    "target_size": "target_size",
    "target_error": "target_error",
    "backend": "backend",
    "skip": "skip_modules",
    "keep_residual": "keep_residual",
    "strict": "strict",
    "calibration_batches": "calibration_samples",
    "iterations": "iterations",
    "seed": "seed",
}
"""Option -> field of ``HfQuantConfig``."""


def _quality(model: str, quantized: PreTrainedModel, text: Path, tokens: int) -> dict[str, Any]:
    ids = text_tokens(load_tokenizer(model), read_text(text))[:tokens]
    return measure_quality(load_language_model(model), quantized, ids)


def _save(quantized: PreTrainedModel, output: Path, model: str, report: dict[str, Any], max_shard_size: str) -> None:
    """Checkpoint, companion files and report, as a whole."""
    with staged_folder(output) as folder:
        write_report(report, folder)
        quantized.save_pretrained(folder, max_shard_size=max_shard_size)
        for file in folder.glob("*.safetensors"):
            canonicalize_header(file)
        copy_companion_files(model, folder)


def _check_request(model: str, config: HfQuantConfig, calibration: Path | None) -> None:
    """Refuse what cannot work before anything is read or written."""
    if getattr(read_config(model), "quantization_config", None) is not None:
        raise ConfigError(f"{model} is quantized already; start from the float model, or run hfquant dequantize first")
    if calibration is not None:
        read_text(calibration)
        load_tokenizer(model)
        return
    settings = config.resolve()
    if "static" in (settings.quantization_type, *(override.quantization_type for override in settings.overrides)):
        raise CalibrationError("static activations need --calibration FILE: UTF-8 text like what the model will see")
    if config.algorithm in CALIBRATED:
        raise CalibrationError(f"{config.algorithm} needs --calibration FILE: UTF-8 text like what the model will see")


def _resume_folder(
    model: str, output: Path, fields: dict[str, Any], dtype: str, calibration: Path | None
) -> ResumeFolder:
    """Finished parts of an earlier run of this very command, or an empty folder."""
    source = Path(model)
    files = list(source.glob("*.safetensors")) if source.is_dir() else []
    files += [] if calibration is None else [calibration]
    settings = {
        "fields": fields,
        "dtype": dtype,
        "model": model,
        "hfquant": version("hfquant"),
        "torch": version("torch"),
    }
    for leftover in output.parent.glob(f".{output.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while it saved
    return ResumeFolder(output.parent / f".{output.name}.resume", run_fingerprint(settings, files))


def _load_quantized(
    model: str, config: HfQuantConfig, dtype: str, calibration: Path | None, resume: ResumeFolder
) -> PreTrainedModel:
    if calibration is None and config.budget() is None:
        config.resume = resume
        return load_model(model, dtype=dtype, quantization_config=config)
    tokenizer = None if calibration is None else load_tokenizer(model)
    floats = load_model(model, dtype=dtype)
    return quantize_model_ptq(floats, config, calibration_data=calibration, tokenizer=tokenizer, resume=resume)


def quality_report(quantized: PreTrainedModel, model: str, seconds: float) -> dict[str, Any]:
    """How each layer of ``quantized`` came about, and what the run took; without figures of quality."""
    info, quantizer = get_quantization_info(quantized), quantized.hf_quantizer
    parameters = {q.name: q for q in info.quantized}
    layers = [asdict(result) for result in quantizer.results]
    known = {layer["name"].partition("[")[0] for layer in layers}
    for name, parameter in parameters.items():
        if name not in known and not parameter.tied_to:
            row = LayerResult(name, parameter.scheme, str(_data_free(info)), parameter.sqnr_db or math.nan, None, 0)
            layers.append(asdict(row))
    for layer in layers:
        parameter = parameters[layer["name"].partition("[")[0]]
        layer["bits_per_weight"] = 8 * parameter.bytes_after / max(1, parameter.numel)
    return {
        "model": Path(model).name,
        "algorithm": info.algorithm,
        "layers": layers,
        "kept": {kept.name: kept.reason for kept in info.kept},
        "bytes_before": info.bytes_before,
        "bytes_after": info.bytes_after,
        "bits_per_weight": info.bits_per_weight,
        "coverage": info.coverage,
        "calibration": quantizer.quantization_config.calibration,
        "activations": activation_shares(quantized),
        "allocation": quantizer.quantization_config.allocation,
        "seconds": seconds,
        "peak_memory": peak_process_bytes(),
    }


def _data_free(info: QuantizationInfo) -> str:
    return "search" if info.algorithm in CALIBRATED else str(info.algorithm)


def _summary(model: PreTrainedModel, output: Path, seconds: float) -> dict[str, Any]:
    info = get_quantization_info(model)
    return {
        "bits": info.quantization_bits,
        "type": info.quantization_type,
        "algorithm": info.algorithm,
        "embedding_bits": info.embedding_bits,
        "quantized_parameters": len(info.quantized),
        "kept_parameters": len(info.kept),
        "coverage": info.coverage,
        "bits_per_quantized_weight": info.bits_per_weight,
        "bytes_before": info.bytes_before,
        "bytes_after": info.bytes_after,
        "file_bytes": folder_bytes(output),
        "seconds": seconds,
    }

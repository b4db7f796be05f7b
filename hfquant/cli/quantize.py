"""``hfquant quantize``: a float checkpoint to a quantized one."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import PreTrainedModel

from hfquant.cli.config_file import load_config_file
from hfquant.cli.models import check_output, folder_bytes, load_model, read_config
from hfquant.cli.output import print_result
from hfquant.cli.text import load_tokenizer, read_text, text_windows
from hfquant.errors import CalibrationError, ConfigError
from hfquant.formats.staging import staged_folder
from hfquant.hf.companions import copy_companion_files
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.info import get_quantization_info
from hfquant.hf.quantize import quantize_model_ptq


CALIBRATION_WINDOW = 512
"""Tokens of one calibration batch, unless the model takes fewer."""


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a float model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the quantized model.")],
    bits: Annotated[int | None, typer.Option(help="Bits of the weights: 8 or 4.")] = None,
    type: Annotated[str | None, typer.Option(help="weight_only, dynamic or static.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1: one per channel.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Without zero points.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="search or rtn.")] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="Embedding and head: 8, 4, or 16 for float.")] = None,
    backend: Annotated[str | None, typer.Option(help="hfquant or bitsandbytes.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Module to keep in float; repeat for more.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Fail if a linear layer would stay float.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with these settings.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file, for static activations.")] = None,
    calibration_batches: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to calibrate on.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of what stays float: auto, float32, bfloat16, float16.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize MODEL and save it. Weights are quantized one by one while they are read."""
    output = check_output(output, model, overwrite=overwrite)
    fields: dict[str, Any] = {} if config is None else load_config_file(config)
    options = {
        "quantization_bits": bits,
        "quantization_type": type,
        "group_size": group_size,
        "symmetric": symmetric,
        "algorithm": algorithm,
        "embedding_bits": embedding_bits,
        "backend": backend,
        "skip_modules": skip or None,
        "strict": strict,
    }
    fields |= {name: value for name, value in options.items() if value is not None}
    started = time.perf_counter()
    quantized = _load_quantized(model, HfQuantConfig(**fields), dtype, calibration, calibration_batches)
    with staged_folder(output) as folder:
        quantized.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_companion_files(model, folder)
    print_result(_summary(quantized, output, time.perf_counter() - started), as_json=json, title=f"{model} -> {output}")


def _load_quantized(
    model: str, config: HfQuantConfig, dtype: str, calibration: Path | None, batches: int
) -> PreTrainedModel:
    if getattr(read_config(model), "quantization_config", None) is not None:
        raise ConfigError(f"{model} is quantized already; start from the float model, or run hfquant dequantize first")
    if calibration is not None:
        data = calibration_data(model, calibration, batches)
        return quantize_model_ptq(load_model(model, dtype=dtype), config, calibration_data=data)
    settings = config.resolve()
    if "static" in (settings.quantization_type, *(override.quantization_type for override in settings.overrides)):
        raise CalibrationError("static activations need --calibration FILE: UTF-8 text like what the model will see")
    return load_model(model, dtype=dtype, quantization_config=config)


def calibration_data(model: str, file: Path, limit: int) -> list[dict[str, Tensor]]:
    """Up to ``limit`` consecutive windows of a text file, as the arguments of ``model`` (folder or Hub name).

    Raises:
        CalibrationError: If the file cannot be read or holds no text.
        ConfigError: If the model has no tokenizer.
    """
    text, config = read_text(file), read_config(model)
    length = min(CALIBRATION_WINDOW, getattr(config, "max_position_embeddings", CALIBRATION_WINDOW))
    windows = text_windows(load_tokenizer(model), text, length)[:limit]
    names = ("input_ids", "decoder_input_ids") if config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, window) for window in windows]


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

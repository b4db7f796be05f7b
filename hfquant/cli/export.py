"""``hfquant export``: a quantized checkpoint in the format of another engine."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from hfquant.cli.models import check_output, load_language_model, parse_dtype
from hfquant.cli.output import print_result
from hfquant.cli.text import load_tokenizer, read_text, text_tokens
from hfquant.errors import ConfigError
from hfquant.evaluation.compare import compare_models
from hfquant.hf.export import ExportReport, export_model
from hfquant.nn.packed_module import PackedModule


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a model quantized by hfquant.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the export.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gptq, gguf or dense.")],
    engine: Annotated[
        str | None, typer.Option("--for", help="Check first what vllm, sglang, transformers or llama.cpp can run.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of dense tensors: float32, bfloat16, float16.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that will share each layer.")] = 1,
    gptq_version: Annotated[int | None, typer.Option(help="1 or 2; default 1 if symmetric.")] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Text file: measure on it what --dtype costs, as mean KL.")
    ] = None,
    evaluate_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to measure on.")] = 8192,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write MODEL for another engine, file by file and with unchanged codes."""
    if evaluate is not None and dtype is None:
        raise ConfigError("--evaluate measures what --dtype costs; give one, as in --dtype bfloat16")
    ids = None if evaluate is None else text_tokens(load_tokenizer(model), read_text(evaluate))[:evaluate_tokens]
    report = export_model(
        model,
        to,
        check_output(output, model, overwrite=overwrite),
        engine=engine,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        gptq_version=gptq_version,
        max_shard_size=max_shard_size,
        revision=revision,
    )
    result = _summary(report)
    if ids is not None and dtype is not None:
        result["dtype_cost"] = _dtype_cost(model, report, dtype, ids)
    print_result(result, as_json=json, title=f"{model} -> {output}")


def _summary(report: ExportReport) -> dict[str, Any]:
    return {
        "output": report.folder,
        "format": report.format,
        "quantized_layers": len(report.schemes),
        "schemes": sorted(set(report.schemes.values())),
        "dense": report.dense,
        "notes": report.notes,
        "file_bytes": report.file_bytes,
    }


def _dtype_cost(model: str, report: ExportReport, dtype: str, ids: Tensor) -> dict[str, Any]:
    narrow = in_dtype(load_language_model(model), list(report.dense), parse_dtype(dtype))
    compared = compare_models(load_language_model(model), {dtype: narrow}, ids)[dtype]
    return {"dtype": dtype, "mean_kl": compared.mean_kl, "tokens": compared.tokens}


@torch.no_grad()
def in_dtype(model: PreTrainedModel, dense: list[str], dtype: torch.dtype) -> PreTrainedModel:
    """What an export holds of ``model``: the packed weights ``dense`` as float ones, and all float ones in ``dtype``.

    Only the values are rounded; computing stays in the dtype of the model.
    """
    for name in dense:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, PackedModule):
            module.restore_()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(parameter.to(dtype))
    return model

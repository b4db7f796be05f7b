"""``hfquant export``: a quantized checkpoint in the format of another engine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli.models import check_output
from hfquant.cli.output import print_result
from hfquant.hf.export import export_model


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
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write MODEL for another engine, file by file and with unchanged codes."""
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
    result: dict[str, Any] = {
        "output": report.folder,
        "format": report.format,
        "quantized_layers": len(report.schemes),
        "schemes": sorted(set(report.schemes.values())),
        "dense": report.dense,
        "notes": report.notes,
        "file_bytes": report.file_bytes,
    }
    print_result(result, as_json=json, title=f"{model} -> {output}")

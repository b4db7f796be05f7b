"""``hfquant dequantize``: a quantized checkpoint to a plain float one."""

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli.models import check_output, folder_bytes, load_model, parse_dtype
from hfquant.cli.output import print_result
from hfquant.formats.staging import staged_folder
from hfquant.hf.companions import copy_companion_files
from hfquant.hf.quantize import dequantize_model


def dequantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a quantized model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the float model.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Save the float model that MODEL's codes stand for; plain Transformers loads it."""
    output, wanted = check_output(output, model, overwrite=overwrite), parse_dtype(dtype)
    floats = dequantize_model(load_model(model), wanted)
    with staged_folder(output) as folder:
        floats.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_companion_files(model, folder)
    result = {"output": str(output), "dtype": dtype, "file_bytes": folder_bytes(output)}
    print_result(result, as_json=json, title=f"{model} -> {output}")

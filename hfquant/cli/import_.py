"""``hfquant import``: a checkpoint of another quantizer in hfquant's format."""

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli.models import check_output
from hfquant.cli.output import print_result
from hfquant.hf.importing import import_model


def import_checkpoint(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a compressed-tensors or GPTQ checkpoint.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the native checkpoint.")],
    round_scales: Annotated[bool, typer.Option("--round-scales", help="Round scales to bfloat16.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rewrite MODEL with unchanged codes, so that it runs on hfquant's kernels and fine-tunes."""
    target = check_output(output, model, overwrite=overwrite)
    report = import_model(model, target, round_scales=round_scales, max_shard_size=max_shard_size, revision=revision)
    schemes = sorted(set(report.schemes.values()))
    result = {"output": report.folder, "quantized_layers": len(report.schemes), "schemes": schemes}
    print_result(result | {"largest_rounding": report.largest_rounding}, as_json=json, title=f"{model} -> {output}")

"""``hfquant info``: what is quantized in a checkpoint, and what is kept, with reasons."""

from typing import Annotated

import typer

from hfquant.cli.models import load_model
from hfquant.cli.output import print_json
from hfquant.hf.info import get_quantization_info


def info(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a model.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every parameter of MODEL: quantized, with its scheme, or kept, with the reason."""
    found = get_quantization_info(load_model(model))
    if json:
        print_json(found.to_dict())
    else:
        print(found)

"""``hfquant plan``: what quantizing a model will take and give."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli.config_file import load_config_file
from hfquant.cli.models import read_config
from hfquant.cli.output import print_json
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.plan import plan_quantization


def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a float model.")],
    bits: Annotated[int | None, typer.Option(help="Bits of the weights: 8 or 4.")] = None,
    type: Annotated[str | None, typer.Option(help="weight_only, dynamic or static.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1: one per channel.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="gptq, signround, awq, search or rtn.")] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="Embedding and head: 8, 4, or 16 for float.")] = None,
    target_bits: Annotated[float | None, typer.Option(help="Choose bits and group per layer: this average.")] = None,
    target_size: Annotated[str | None, typer.Option(help="Choose them for a size: 90MB.")] = None,
    calibrated: Annotated[bool | None, typer.Option("--calibrated", help="There will be calibration data.")] = None,
    calibration_batches: Annotated[int | None, typer.Option(min=1, help="Windows to calibrate on (128).")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with these settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Size, memory, time and kept layers of a quantized MODEL, before any weight is read."""
    read_config(model)
    fields: dict[str, Any] = {} if config is None else load_config_file(config)
    options = {
        "quantization_bits": bits,
        "quantization_type": type,
        "group_size": group_size,
        "algorithm": algorithm,
        "embedding_bits": embedding_bits,
        "calibration_samples": calibration_batches,
        "target_bits": target_bits,
        "target_size": target_size,
    }
    fields |= {name: value for name, value in options.items() if value is not None}
    found = plan_quantization(model, HfQuantConfig(**fields), calibrated=calibrated)
    if json:
        print_json(found.to_dict())
    else:
        print(found)

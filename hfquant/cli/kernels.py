"""``hfquant kernels``: which implementation of each op runs here, and why."""

import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from hfquant.cli.output import print_json
from hfquant.kernels import int4_linear, int8_linear, native, quant_embedding  # noqa: F401  # define the ops
from hfquant.kernels.dispatch import implementations


def kernels(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show which implementation of each operation runs on this machine, and why."""
    found = implementations()
    sets = native.instruction_sets()
    if json:
        ops = {op: [entry._asdict() for entry in entries] for op, entries in found.items()}
        print_json({"torch": torch.__version__, "instruction_sets": sets, "ops": ops})
        return
    table = Table("op", "device", "implementation", "runs", "why", title="hfquant kernels", title_justify="left")
    for op, entries in found.items():
        for entry in entries:
            table.add_row(op, entry.device, entry.name, "yes" if entry.runs else "no", entry.reason)
    console = Console()
    console.print(table)
    built = ", ".join(f"{name} ({'usable' if usable else 'not on this processor'})" for name, usable in sets.items())
    console.print(f"{platform.machine()}, torch {torch.__version__}; instruction sets in the build: {built or 'none'}")

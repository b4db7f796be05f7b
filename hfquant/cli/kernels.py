"""``hfquant kernels``: which implementation each op uses on this machine, and why."""

import importlib
import pkgutil
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import hfquant.kernels as folder
from hfquant.cli.output import print_json
from hfquant.kernels import native
from hfquant.kernels.dispatch import choices


def kernels(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which implementation each op uses here, and why not a faster one."""
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.startswith("_"):  # the native library is no Python module
            importlib.import_module(f"{folder.__name__}.{module.name}")
    found, sets = list(choices()), native.instruction_sets()
    if json:
        print_json({"torch": torch.__version__, "instruction_sets": sets, "ops": [asdict(choice) for choice in found]})
        return
    table = Table(title=f"torch {torch.__version__}", title_justify="left")
    for heading in ("op", "device", "implementation", "why not a faster one"):
        table.add_column(heading)
    for choice in found:
        table.add_row(choice.op, choice.device, choice.implementation, choice.reason)
    Console().print(table)
    built = ", ".join(f"{name}{'' if usable else ' (not on this processor)'}" for name, usable in sets.items())
    Console().print(f"native: {native.name()} ({native.reason()}); in this build: {built or 'none'}")

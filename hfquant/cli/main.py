"""The ``hfquant`` command: a verb, and the function that does it."""

from collections.abc import Callable

import typer

from hfquant.cli.dequantize import dequantize
from hfquant.cli.evaluate import evaluate
from hfquant.cli.export import export
from hfquant.cli.generate import generate
from hfquant.cli.import_ import import_checkpoint
from hfquant.cli.info import info
from hfquant.cli.kernels import kernels
from hfquant.cli.output import reporting_errors
from hfquant.cli.plan import plan
from hfquant.cli.push import push
from hfquant.cli.quantize import quantize
from hfquant.cli.report import report
from hfquant.cli.train import train
from hfquant.cli.verify import verify


VERBS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "quantize": quantize,
    "info": info,
    "report": report,
    "evaluate": evaluate,
    "generate": generate,
    "dequantize": dequantize,
    "kernels": kernels,
    "export": export,
    "import": import_checkpoint,
    "verify": verify,
    "push": push,
    "train": train,
}

app = typer.Typer(
    name="hfquant",
    help="Quantize Transformers models. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for verb, function in VERBS.items():
    app.command(verb)(reporting_errors(function))


def main() -> None:
    """Entry point of the console script."""
    app()

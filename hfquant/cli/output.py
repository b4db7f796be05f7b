"""What the command prints: results on stdout, everything else on stderr."""

import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from hfquant.errors import HfQuantError
from hfquant.formats.quality_report import json_ready


EXPECTED_ERRORS = (HfQuantError, OSError, ValueError, ImportError, SafetensorError)
"""What users and files cause; anything else is a bug and keeps its traceback."""


def reporting_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with a message on stderr and exit code 1 for expected errors, and ``--debug`` for their traceback."""

    @functools.wraps(verb)
    def wrapper(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: typer ends quietly
        except EXPECTED_ERRORS as error:
            if debug:
                raise
            message = str(error) if isinstance(error, HfQuantError) else one_line(error)
            print(f"hfquant: {type(error).__name__}: {message}", file=sys.stderr)
            raise typer.Exit(1) from None

    option = typer.Option("--debug", help="Show the traceback of an error.")
    parameter = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )
    signature = inspect.signature(verb)
    wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), parameter]
    )
    wrapper.__annotations__ = verb.__annotations__ | {"debug": parameter.annotation}
    return wrapper


def one_line(error: Exception) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split())


def print_result(result: Mapping[str, Any], *, as_json: bool, title: str) -> None:
    """Print ``result`` as one JSON object, or as a two-column table."""
    if as_json:
        print_json(result)
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in result.items():
        table.add_row(key.replace("_", " "), _text(value))
    Console().print(table)


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON object; numbers that JSON does not have (NaN, infinity) are null."""
    print(json.dumps(json_ready(result), indent=2, allow_nan=False))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

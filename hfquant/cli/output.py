"""What the command prints: results on stdout, everything else on stderr."""

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from hfquant.errors import HfQuantError


def reporting_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Turn expected errors into one line on stderr and exit code 1; ``HFQUANT_DEBUG=1`` shows the traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (HfQuantError, OSError, ValueError, ImportError) as error:
            if os.environ.get("HFQUANT_DEBUG"):
                raise
            print(f"hfquant: {type(error).__name__}: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapper


def print_result(result: Mapping[str, Any], *, as_json: bool, title: str) -> None:
    """Print ``result`` as one JSON object, or as a two-column table."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in result.items():
        table.add_row(key.replace("_", " "), _text(value))
    Console().print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

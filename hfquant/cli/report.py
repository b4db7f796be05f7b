"""``hfquant report``: the quality report beside a checkpoint, as a page or as JSON."""

from pathlib import Path
from typing import Annotated

import typer

from hfquant.cli.output import print_json, print_result
from hfquant.evaluation.report import report_html
from hfquant.formats.quality_report import read_report, report_markdown, summary_rows


def report(
    model: Annotated[Path, typer.Argument(help="Folder of a quantized model.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a model card.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how MODEL was quantized and what it cost, layer by layer."""
    found = read_report(model)
    if html is not None:
        html.write_text(report_html(found), encoding="utf-8")
    if markdown:
        print(report_markdown(found))
    elif json:
        print_json(found)
    else:
        print_result(dict(summary_rows(found)), as_json=False, title=str(model))

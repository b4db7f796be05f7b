"""``hfquant verify``: is a checkpoint whole, sane, and byte for byte what was saved?"""

from typing import Annotated

import typer

from hfquant.cli.output import print_result
from hfquant.errors import FormatError
from hfquant.hf.verify import verify_checkpoint


def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a quantized model or an export.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check structure, values and the recorded sha256 of everything in MODEL; exit code 1 if anything differs."""
    found = verify_checkpoint(model, revision=revision)
    result = {"folder": found.folder, "files": found.files, "tensors": found.tensors, "hashes": found.hashes}
    print_result(result | {"problems": list(found.problems)}, as_json=json, title=model)
    if found.problems:
        raise FormatError(f"{len(found.problems)} problems; the first: {found.problems[0]}")

"""``hfquant push``: a checkpoint to the Hub, with its card, in one commit."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli.output import print_result
from hfquant.errors import ConfigError
from hfquant.hf.hub import push_checkpoint


def push(
    folder: Annotated[Path, typer.Argument(help="Quantized model, export or adapter.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    base_model: Annotated[str | None, typer.Option(help="Hub name of the model it was made from.")] = None,
    quality: Annotated[Path | None, typer.Option(help="What hfquant evaluate --json printed, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence; default: that of the base model.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    token: Annotated[str | None, typer.Option(help="Default: the one you are logged in with.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Push FOLDER to the Hub and remove weight files of earlier pushes in the same commit."""
    figures: dict[str, Any] | None = None
    if quality is not None:
        try:
            figures = dict(json_module.loads(quality.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{quality}: expected the JSON object that hfquant evaluate --json prints") from error
    url = push_checkpoint(
        folder,
        repo_id,
        base_model=base_model,
        quality=figures,
        metadata={"license": license} if license else None,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    print_result({"repo_id": repo_id, "url": url}, as_json=json, title=f"{folder} -> {repo_id}")

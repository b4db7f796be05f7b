"""``hfquant evaluate``: perplexity, and divergence from the original."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from hfquant.cli.models import load_model
from hfquant.cli.output import print_result
from hfquant.errors import CalibrationError
from hfquant.evaluation.compare import compare_models
from hfquant.evaluation.perplexity import perplexity


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a causal language model.")],
    reference: Annotated[str | None, typer.Option(help="The original, to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the help topics of Python.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, from the start of the text.")] = 8192,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of MODEL; with --reference also mean KL and top-1 agreement against the original."""
    ids = AutoTokenizer.from_pretrained(model)(_text(text), return_tensors="pt", verbose=False)["input_ids"][0]
    judged = load_model(model)
    result: dict[str, Any]
    if reference is None:
        result = perplexity(judged, ids[:tokens], context=context).to_dict()
    else:
        result = compare_models(load_model(reference), judged, ids[:tokens], context=context).to_dict()
    print_result(result, as_json=json, title=model)


def default_text() -> str:
    """Text that every CPython carries: the help topics, in order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def _text(file: Path | None) -> str:
    if file is None:
        return default_text()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: cannot be read as UTF-8 text: {error}") from error

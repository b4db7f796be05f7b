"""``hfquant evaluate``: perplexity, and divergence from the original."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hfquant.cli.models import load_language_model
from hfquant.cli.output import print_result
from hfquant.cli.text import default_text, load_tokenizer, read_text, text_tokens
from hfquant.errors import ConfigError
from hfquant.evaluation.compare import compare_models
from hfquant.evaluation.perplexity import perplexity


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a causal language model.")],
    reference: Annotated[str | None, typer.Option(help="The original, to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the help topics of Python.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to evaluate on, from the start of the text.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of MODEL; with --reference also mean KL and top-1 agreement against the original."""
    content = default_text() if text is None else read_text(text)
    judged = _load(model, context)
    ids = text_tokens(load_tokenizer(model), content)[:tokens]
    result: dict[str, Any]
    if reference is None:
        result = perplexity(judged, ids, context=context).to_dict()
    else:
        result = compare_models(_load(reference, context), {model: judged}, ids, context=context)[model].to_dict()
    print_result(result, as_json=json, title=model)


def _load(model: str, context: int) -> Any:
    loaded = load_language_model(model)
    if loaded.config.is_encoder_decoder:
        raise ConfigError(f"{model} is an encoder-decoder; perplexity is measured on causal language models")
    limit = getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ConfigError(f"--context {context}: {model} has {limit} positions; give at most that")
    return loaded

"""``hfquant generate``: let a model answer."""

import time
from typing import Annotated, Any

import typer

from hfquant.cli.models import load_language_model
from hfquant.cli.output import print_json
from hfquant.cli.text import load_tokenizer


def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a language model.")],
    prompt: Annotated[str, typer.Option(help="What to say to it.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template if it has one.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer PROMPT, taking the most likely token each time."""
    answering = load_language_model(model)
    tokenizer = load_tokenizer(model)
    batch = _tokens(tokenizer, prompt, chat=chat)
    started = time.perf_counter()
    out = answering.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - started
    new = out[0] if answering.config.is_encoder_decoder else out[0, batch["input_ids"].shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    if not json:
        print(answer)
        return
    speed = new.numel() / seconds
    print_json({"answer": answer, "tokens": new.numel(), "seconds": seconds, "tokens_per_second": speed})


def _tokens(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    if not chat or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

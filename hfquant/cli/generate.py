"""``hfquant generate``: let a model answer."""

import time
from typing import Annotated

import typer
from transformers import AutoTokenizer

from hfquant.cli.models import load_model
from hfquant.cli.output import print_result


def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a causal language model.")],
    prompt: Annotated[str, typer.Option(help="What to say to it.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template if it has one.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer PROMPT, taking the most likely token each time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        batch = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        batch = tokenizer(prompt, return_tensors="pt")
    answering = load_model(model)
    started = time.perf_counter()
    out = answering.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - started
    new = out[0, batch["input_ids"].shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    if not json:
        print(answer)
        return
    result = {"answer": answer, "tokens": new.numel(), "seconds": seconds, "tokens_per_second": new.numel() / seconds}
    print_result(result, as_json=True, title=model)

"""``hfquant train``: train a language model on a text, with or without quantization, and save it."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from hfquant.cli.models import check_output, copy_companion_files, folder_bytes, load_model
from hfquant.cli.output import print_result
from hfquant.cli.text import load_tokenizer, read_text, text_tokens
from hfquant.errors import CalibrationError, ConfigError
from hfquant.formats.staging import staged_folder


RUN_FIELDS = ("model", "text", "output", "context", "dtype")
"""What a config file of a run may set beside the fields of ``TrainingConfig``."""


def train(
    config: Annotated[Path, typer.Option(help="YAML or JSON: fields of TrainingConfig; model, text, output, context.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub name of a float causal language model.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train on.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the trained model.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of one example; default 512.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train MODEL on a text as CONFIG says; with quantization_mode ptq or qat the result is quantized."""
    # Transformers' Trainer takes over a second to import; the other verbs do not wait for it.
    from hfquant.training.config import TrainingConfig, read_yaml
    from hfquant.training.trainer import QuantTrainer

    fields = read_yaml(config)
    run = {name: fields.pop(name) for name in RUN_FIELDS if name in fields}
    given = {"model": model, "text": text, "output": output, "context": context}
    run |= {name: value for name, value in given.items() if value is not None}
    for name in ("model", "text", "output"):
        if name not in run:
            raise ConfigError(f"{config}: {name} is not set; set it there, or pass --{name}")
    target = check_output(Path(run["output"]), run["model"], overwrite=overwrite)
    # Checkpoints go beside the result, which is written at once when all is done.
    fields.setdefault("output_dir", f"{target}-checkpoints")
    fields.setdefault("report_to", "none")
    args = TrainingConfig.from_fields(fields, where=str(config))
    tokenizer = load_tokenizer(run["model"])
    dataset = examples(text_tokens(tokenizer, read_text(Path(run["text"]))), int(run.get("context", 512)))
    loaded = load_model(run["model"], dtype=run.get("dtype", "float32"))
    if not loaded.can_generate():
        raise ConfigError(f"{run['model']} is a {type(loaded).__name__}; expected a causal language model")
    trainer = QuantTrainer(model=loaded, args=args, train_dataset=dataset)
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=resume or None)
    with staged_folder(target) as folder:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
        copy_companion_files(run["model"], folder)
    summary = {
        "mode": args.quantization_mode,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "examples": len(dataset),
        "file_bytes": folder_bytes(target),
        "seconds": time.perf_counter() - started,
    }
    print_result(summary, as_json=json, title=f"{run['model']} -> {target}")


def examples(ids: Tensor, context: int) -> list[dict[str, Tensor]]:
    """Consecutive windows of ``context`` tokens, each its own labels; a shorter rest is dropped.

    Raises:
        CalibrationError: If there are fewer than ``context`` tokens.
    """
    windows = [window for window in ids.split(context) if window.numel() == context]
    if not windows:
        raise CalibrationError(f"the text has {ids.numel()} tokens, fewer than one example of {context}")
    return [{"input_ids": window, "attention_mask": torch.ones_like(window), "labels": window} for window in windows]

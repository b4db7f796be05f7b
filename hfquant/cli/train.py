"""``hfquant train``: train a language model on a text, with or without quantization, and save it."""

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from hfquant.cli.models import check_output, folder_bytes, load_model
from hfquant.cli.output import print_result
from hfquant.cli.text import load_tokenizer, read_text, text_tokens
from hfquant.errors import CalibrationError, ConfigError
from hfquant.formats.staging import staged_folder
from hfquant.hf.companions import copy_companion_files


RUN_FIELDS = ("model", "text", "output", "context", "dtype")
"""What a config file of a run may set beside the fields of ``TrainingConfig``."""


def train(
    config: Annotated[Path, typer.Option(help="YAML or JSON: fields of TrainingConfig; model, text, output, context.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub name of a causal language model.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train on.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the trained model.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of one example; default 512.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train MODEL on a text as CONFIG says; with quantization_mode ptq or qat the result is quantized.

    With enable_quantized_finetuning MODEL is quantized, and so is the result.
    """
    given = {"model": model, "text": text, "output": output, "context": context}
    run, fields = read_run(config, {name: value for name, value in given.items() if value is not None})
    target = check_output(Path(run["output"]), run["model"], overwrite=overwrite)
    # Checkpoints go beside the result, which is written at once when all is done.
    trainer = make_trainer(run, {"output_dir": f"{target}-checkpoints", "report_to": "none"} | fields, str(config))
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):  # the Trainer prints its logs; stdout is for the result
        result = trainer.train(resume_from_checkpoint=resume or None)
    with staged_folder(target) as folder:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
        copy_companion_files(run["model"], folder)
    summary = {
        "mode": "finetune" if trainer.args.enable_quantized_finetuning else trainer.args.quantization_mode,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "file_bytes": folder_bytes(target),
        "seconds": time.perf_counter() - started,
    }
    print_result(summary, as_json=json, title=f"{run['model']} -> {target}")


def read_run(config: Path, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to run, from the config file and what is ``given`` beside it, and the fields of ``TrainingConfig``.

    Raises:
        ConfigError: If the file cannot be read, or model, text or output is set nowhere.
    """
    from hfquant.training.config import read_yaml

    fields = read_yaml(config)
    run = {name: fields.pop(name) for name in RUN_FIELDS if name in fields} | given
    for name in ("model", "text", "output"):
        if name not in run:
            raise ConfigError(f"{config}: {name} is not set; set it there, or pass --{name}")
    return run, fields


def make_trainer(run: dict[str, Any], fields: dict[str, Any], where: str) -> Any:
    """A ``QuantTrainer`` for the model and the text of ``run``.

    Raises:
        ConfigError: If a field is wrong, or the model is no causal language model.
        CalibrationError: If the text is too short.
    """
    # Transformers' Trainer takes over a second to import; the other verbs do not wait for it.
    from hfquant.training.config import TrainingConfig
    from hfquant.training.trainer import QuantTrainer

    args = TrainingConfig.from_fields(fields, where=where)
    tokenizer = load_tokenizer(run["model"])
    dataset = examples(text_tokens(tokenizer, read_text(Path(run["text"]))), int(run.get("context", 512)))
    model = load_model(run["model"], dtype=run.get("dtype", "float32"))
    if not model.can_generate():
        raise ConfigError(f"{run['model']} is a {type(model).__name__}; expected a causal language model")
    return QuantTrainer(model=model, args=args, train_dataset=dataset)


def examples(ids: Tensor, context: int) -> list[dict[str, Tensor]]:
    """Consecutive windows of ``context`` tokens, each its own labels; a shorter rest is dropped.

    Raises:
        CalibrationError: If there are fewer than ``context`` tokens.
    """
    windows = [window for window in ids.split(context) if window.numel() == context]
    if not windows:
        raise CalibrationError(f"the text has {ids.numel()} tokens, fewer than one example of {context}")
    return [{"input_ids": window, "attention_mask": torch.ones_like(window), "labels": window} for window in windows]

"""``QatCallback``: quantization-aware training in any Trainer, and the part of it that ``QuantTrainer`` shares."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfquant.errors import ConfigError, FormatError
from hfquant.finetune.adapted import adapted_modules
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.qat import check_something_trains, convert_model_qat, prepare_model_qat, qat_state
from hfquant.nn.adapted_module import AdaptedModule
from hfquant.nn.fake_quant_module import FakeQuantModule
from hfquant.qat.convert import check_blend
from hfquant.qat.prepare import fake_quant_modules, keep_codes, set_blend
from hfquant.qat.schedule import blend_at


RECORD = "hfquant_training.json"
"""File of a training checkpoint that says what it is."""

EARLIER = {"adapter_delay_steps": 0}
"""Fields that records of earlier versions lack, and what those did."""

SAMPLED_ROWS = 256
"""Rows of each weight whose codes are watched, evenly spread."""


class CodesCallback(TrainerCallback):
    """Adds ``code_flips`` to the logs: the share of codes that changed since the last log."""

    def __init__(self) -> None:
        self.watched: dict[str, Tensor] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``code_flips``."""
        if logs is None or "loss" not in logs or not self.watched:
            return
        before, self.watched = self.watched, sampled_codes(model)
        flipped = sum(int((codes != before[name]).sum()) for name, codes in self.watched.items())
        logs["code_flips"] = flipped / max(1, sum(codes.numel() for codes in before.values()))
        if state.log_history:
            state.log_history[-1]["code_flips"] = logs["code_flips"]


class QatCallback(CodesCallback):
    """Quantization-aware training for those who must keep their own Trainer, TRL's ``SFTTrainer`` included.

    Prepares the model when the Trainer is made, so it has to be in ``callbacks=[...]`` there; when training ends the
    model is quantized, and ``trainer.save_model`` saves it so. ``QuantTrainer`` does more: a learning rate of their own
    for scales, distillation, strict resuming.

    Args:
        config: How the model will be quantized; ``None`` starts from the defaults.
        blend_steps: Optimizer steps over which quantization is blended in.
        convert: Quantize the model when training ends.
        **options: For ``prepare_model_qat``: ``variant``, ``calibration_data``, fields of ``HfQuantConfig``, ...
    """

    def __init__(
        self, config: HfQuantConfig | None = None, *, blend_steps: int = 0, convert: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.config, self.blend_steps, self.convert, self.options = config, blend_steps, convert, options

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prepare the model, before the optimizer is made."""
        if qat_state(model) is None:
            prepare_model_qat(model, self.config, progress=not args.disable_tqdm, **self.options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check that this can end in a quantized model, and set what the first step computes with."""
        if isinstance(model, AveragedModel) or qat_state(model) is None:
            raise ConfigError(
                "the model was not prepared for quantization-aware training, or is an average of models: give "
                "QatCallback in callbacks=[...] when the Trainer is made, and do not average weights (EMA, SWA): an "
                "average of grid points is not on the grid"
            )
        check_something_trains(model)
        if self.blend_steps >= state.max_steps:
            raise ConfigError(
                f"qat_blend_steps={self.blend_steps} of {state.max_steps} steps: the model would never be fully "
                "quantized; give fewer"
            )
        set_blend(model, blend_at(state.global_step, self.blend_steps))
        keep_codes(model, args.gradient_accumulation_steps > 1 or bool(args.gradient_checkpointing))
        self.watched = sampled_codes(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the blend of this step."""
        set_blend(model, blend_at(state.global_step, self.blend_steps))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the blend that evaluation and saving see, and forget the codes of the weights before the step."""
        set_blend(model, blend_at(state.global_step, self.blend_steps))
        for _, module in fake_quant_modules(model):
            module.forget_codes()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write down what the checkpoint is."""
        found = qat_state(model)
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if found is not None and state.is_world_process_zero and folder.is_dir():
            write_record(folder, found.record())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Quantize the model."""
        keep_codes(model, False)
        self.watched = {}
        if self.convert:
            check_blend(model)
            convert_model_qat(model)


@torch.no_grad()
def sampled_codes(model: nn.Module) -> dict[str, Tensor]:
    """Codes of up to ``SAMPLED_ROWS`` rows of each weight in training, by name."""
    found = {}
    modules: list[tuple[str, FakeQuantModule | AdaptedModule]] = [*fake_quant_modules(model), *adapted_modules(model)]
    for name, module in modules:
        for key in module.float_weights:
            codes = module.codes(key).flatten(0, -2)
            found[f"{name}.{key}"] = codes[:: -(-codes.shape[0] // SAMPLED_ROWS)].clone()
    return found


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``hfquant_training.json`` into a checkpoint, at once or not at all."""
    content = dict(record) | {"hfquant_version": version("hfquant")}
    written = folder / f"{RECORD}.new"
    written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    written.replace(folder / RECORD)


def check_resumable(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Refuse to resume from a checkpoint of a run that trained something else.

    Args:
        folder: The checkpoint.
        record: Of the run that would resume; ``None`` for a float model.

    Raises:
        ConfigError: If the checkpoint is of another mode, variant, adapter or scheme.
        FormatError: If its record cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        if record is not None:
            raise ConfigError(
                f"{folder}: not a checkpoint of {MODES[record['quantization_mode']]} ({RECORD} is missing)"
            )
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file}: damaged: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file}: expected an object, found {type(found).__name__}")
    ours = {"quantization_mode": None} if record is None else json.loads(json.dumps(record))
    for name, value in ours.items():
        if found.get(name, EARLIER.get(name)) != value:
            raise ConfigError(f"{folder} cannot be resumed: {_difference(name, found.get(name), value)}")


MODES = {"qat": "quantization-aware training", "finetune": "quantized fine-tuning"}


def _difference(name: str, found: Any, ours: Any) -> str:
    if name != "modules" or not isinstance(found, dict):
        return f"its {name} is {found!r}, this run's is {ours!r}"
    for module in sorted(set(found) | set(ours)):
        if found.get(module) != ours.get(module):
            return f"it trained {module} for {found.get(module)}, this run trains it for {ours.get(module)}"
    return "its modules differ"

"""``FinetuneCallback``: quantized fine-tuning in any Trainer, and the part of it that ``QuantTrainer`` shares."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hfquant.errors import ConfigError
from hfquant.finetune.merge import check_trained
from hfquant.hf.config import check_integer
from hfquant.hf.finetune import finetune_state
from hfquant.hf.finetune_checkpoint import load_finetune_checkpoint_, save_training_state
from hfquant.hf.qat import check_something_trains
from hfquant.hf.rounding import is_rounded, round_anew, set_rounding
from hfquant.nn.adapted_module import ADAPTER_SUFFIXES
from hfquant.training.callback import CodesCallback, check_resumable, sampled_codes, write_record


class FinetuneCallback(CodesCallback):
    """Exact resuming of quantized fine-tuning for those who must keep their own Trainer, TRL's ``SFTTrainer`` included.

    Give the Trainer a model from ``prepare_model_for_finetuning(model, "grid")`` or ``"scales"``, and this in
    ``callbacks=[...]``: beside each checkpoint, which is a quantized model by itself, stands the training state.
    ``QuantTrainer`` does more: a learning rate of their own for scales, checkpoints that are whole or not there at all.

    Args:
        delay_steps: Optimizer steps for which ``"grid"`` trains without rounding; see ``hfquant/hf/rounding.py``. All
            of it follows from the number of the step, so that a resumed run does what one without a break does.
        calibration_data: What the weights are rounded anew on then, as for ``quantize_model_ptq``; the same in each
            process.

    Raises:
        ConfigError: If the delay is no number of steps, or there is no data for it.
    """

    def __init__(self, *, delay_steps: int = 0, calibration_data: Any = None) -> None:
        super().__init__()
        check_integer("delay_steps", delay_steps, 0)
        if delay_steps and calibration_data is None:
            raise ConfigError(f"delay_steps={delay_steps} needs calibration_data, to round the weights on afterwards")
        self.delay_steps, self.calibration_data = delay_steps or 0, calibration_data

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check that something trains; when resuming, continue from the training state of the checkpoint."""
        found = finetune_state(model)
        if found is None:
            raise ConfigError("the model is not in fine-tuning: call prepare_model_for_finetuning first")
        check_something_trains(model)
        if self.delay_steps and self.delay_steps >= state.max_steps:
            raise ConfigError(
                f"adapter_delay_steps={self.delay_steps} of {state.max_steps} steps: the weights would never be "
                "rounded; give fewer"
            )
        found.delay_steps, found.writes_checkpoints = self.delay_steps, True
        if state.global_step:
            self._resume(Path(args.output_dir or "") / f"checkpoint-{state.global_step}", model)
        if self.delay_steps:
            set_rounding(model, state.global_step > self.delay_steps)
        self.watched = sampled_codes(model) if found.adapter == "grid" else {}

    def _resume(self, folder: Path, model: Any) -> None:
        found = finetune_state(model)
        check_resumable(folder, None if found is None else found.record())
        load_finetune_checkpoint_(model, folder)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Round the weights anew when the delay is over."""
        if not self.delay_steps or state.global_step != self.delay_steps or is_rounded(model):
            return
        self._before_rounding(model)
        given = {"tokenizer": kwargs.get("processing_class"), "optimizer": kwargs.get("optimizer")}
        round_anew(model, self._calibration_data(), seed=args.seed, progress=not args.disable_tqdm, **given)
        # The best so far was a model that is not rounded: its packed state never reached that.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _calibration_data(self) -> Any:
        return self.calibration_data

    def _before_rounding(self, model: Any) -> None:
        pass

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the training state beside the checkpoint."""
        found = finetune_state(model)
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if found is not None and state.is_world_process_zero and folder.is_dir():
            save_training_state(model, folder)
            write_record(folder, found.record())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuse a model whose training diverged."""
        self.watched = {}
        found = finetune_state(model)
        if found is not None:
            found.writes_checkpoints = False
        check_trained(model)


class SavingFinetuneCallback(FinetuneCallback):
    """The callback of ``QuantTrainer``, which saves and loads the training state itself.

    Args:
        delay_steps: As for ``FinetuneCallback``.
        batches: Gives the batches that the weights are rounded on, when it comes to that.
        before_rounding: Called just before, with the model.
        rests: Whether adapters stay as they are from then on.
    """

    def __init__(
        self,
        delay_steps: int,
        batches: Callable[[], Iterable[Any]],
        before_rounding: Callable[[Any], None],
        rests: bool = False,
    ) -> None:
        super().__init__(delay_steps=delay_steps, calibration_data=batches)
        self.before_rounding, self.rests = before_rounding, rests

    def _calibration_data(self) -> Any:
        return self.calibration_data()

    def _before_rounding(self, model: Any) -> None:
        self.before_rounding(model)

    def _resume(self, folder: Path, model: Any) -> None:
        pass

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Keep adapters from the optimizer where they rest; not from DDP, which wants the gradients it began with."""
        if self.rests and state.global_step >= self.delay_steps:
            for name, parameter in model.named_parameters():
                if name.endswith(ADAPTER_SUFFIXES):
                    parameter.grad = None

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do."""

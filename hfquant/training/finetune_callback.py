"""``FinetuneCallback``: quantized fine-tuning in any Trainer, and the part of it that ``QuantTrainer`` shares."""

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hfquant.errors import ConfigError
from hfquant.finetune.merge import check_trained
from hfquant.hf.finetune import finetune_state
from hfquant.hf.finetune_checkpoint import load_finetune_checkpoint_, save_training_state
from hfquant.hf.qat import check_something_trains
from hfquant.training.callback import CodesCallback, check_resumable, sampled_codes, write_record


class FinetuneCallback(CodesCallback):
    """Exact resuming of quantized fine-tuning for those who must keep their own Trainer, TRL's ``SFTTrainer`` included.

    Give the Trainer a model from ``prepare_model_for_finetuning(model, "grid")`` or ``"scales"``, and this in
    ``callbacks=[...]``: beside each checkpoint, which is a quantized model by itself, stands the training state.
    ``QuantTrainer`` does more: a learning rate of their own for scales, checkpoints that are whole or not there at all.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check that something trains; when resuming, continue from the training state of the checkpoint."""
        found = finetune_state(model)
        if found is None:
            raise ConfigError("the model is not in fine-tuning: call prepare_model_for_finetuning first")
        check_something_trains(model)
        if state.global_step:
            self._resume(Path(args.output_dir or "") / f"checkpoint-{state.global_step}", model)
        self.watched = sampled_codes(model) if found.adapter == "grid" else {}

    def _resume(self, folder: Path, model: Any) -> None:
        found = finetune_state(model)
        check_resumable(folder, None if found is None else found.record())
        load_finetune_checkpoint_(model, folder)

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
        check_trained(model)


class SavingFinetuneCallback(FinetuneCallback):
    """The callback of ``QuantTrainer``, which saves and loads the training state itself."""

    def _resume(self, folder: Path, model: Any) -> None:
        pass

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do."""

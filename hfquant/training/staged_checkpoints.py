"""Checkpoints that are whole or not there: written elsewhere, and moved to their name when nothing is missing.

A run that is killed while it saves leaves the checkpoints before, and a folder ``.saving`` that nothing takes for one.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints


STAGING = ".saving"
"""Folder inside the output folder where checkpoints are written."""

STATE = "trainer_state.json"


class StagedCheckpoints(Trainer):
    """A ``Trainer`` whose checkpoints appear at once, if ``stages`` says so.

    Attributes:
        stages: Whether checkpoints are written elsewhere first.
    """

    stages = False
    _staging = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))
        return str(Path(folder) / STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.stages:
            super()._save_checkpoint(model, trial)
            return
        run = Path(super()._get_output_dir(trial))
        staging = run / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self._name_best(run, staging)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(run, staging)
        self.accelerator.wait_for_everyone()

    def _name_best(self, run: Path, staging: Path) -> None:
        """Call the best checkpoint by its final name, if it is this one."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(run / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / Path(best).name / STATE))

    def _publish(self, run: Path, staging: Path) -> None:
        name = f"checkpoint-{self.state.global_step}"
        if (run / name).exists():  # of an earlier run, resumed from before it
            (run / name).rename(staging / f"{name}.old")
        (staging / name).rename(run / name)
        shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

"""``QuantTrainer``: Transformers' ``Trainer``, ending in a model that really is quantized."""

import inspect
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME

from hfquant.errors import ConfigError, FormatError
from hfquant.finetune.merge import check_rounded
from hfquant.formats.headers import read_headers
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.finetune import finetune_state
from hfquant.hf.finetune_checkpoint import load_finetune_checkpoint_, load_teacher, save_training_state
from hfquant.hf.qat import converted_model, prepare_model_qat, qat_state
from hfquant.hf.quantize import quantize_model_ptq
from hfquant.hf.rounding import unrounded_copy
from hfquant.ptq.quantize_matrix import CALIBRATED
from hfquant.qat.distill import distillation_loss, teacher_copy
from hfquant.qat.prepare import bypassed
from hfquant.training.callback import QatCallback, check_resumable, write_record
from hfquant.training.config import TrainingConfig
from hfquant.training.finetune_callback import SavingFinetuneCallback
from hfquant.training.finetuning import quantize_to_train_scales, ready_to_finetune, training_record
from hfquant.training.staged_checkpoints import StagedCheckpoints


SCALE_SUFFIX = "_log_scale"

SCALE_EPSILON = 1e-8
"""Adam's epsilon for the logarithm of scales, whatever ``adam_epsilon`` is."""

AVERAGING = re.compile(r"EMA|SWA|Averag")
"""In the class name of a callback: it averages weights."""


class QuantTrainer(StagedCheckpoints):
    """``Trainer`` for a ``TrainingConfig``; with quantization off it is Transformers' own.

    ``quantization_mode="qat"`` prepares the model at once, before an optimizer exists; ``save_model`` saves the
    quantized model of the current state, and training can go on. ``"ptq"`` quantizes the model when training ends.
    ``enable_quantized_finetuning=True`` takes a quantized model and trains adapters on it; ``save_model`` saves the
    quantized model of the current state (with ``adapter="side"``: the adapter).

    Args:
        *args: As for ``Trainer``.
        teacher_model: Float model to distil from. Without one, ``"lora"`` distils from the model itself with
            quantizers and adapters bypassed, ``"full"`` and ``"scales"`` from a frozen bfloat16 copy, and so does
            ``"lora"`` where training starts from calibrated weights. Fine-tuning with ``adapter_delay_steps`` distils
            from such a copy of what it trained before the rounding, which stands beside its checkpoints.
        **kwargs: As for ``Trainer``.

    Raises:
        ConfigError: If the config and the model do not fit, or the optimizer was made before scales existed.
    """

    args: TrainingConfig
    current_gradient_accumulation_steps = 1  # which train() sets, and training_step reads

    def __init__(self, *args: Any, teacher_model: nn.Module | None = None, **kwargs: Any) -> None:
        given = inspect.signature(Trainer.__init__).bind(self, *args, **kwargs)
        if getattr(given.arguments.get("args"), "enable_quantized_finetuning", False):
            # The Trainer refuses a quantized model that nothing can train in.
            given.arguments["model"] = ready_to_finetune(given.arguments.get("model"), given.arguments["args"])
        super().__init__(*given.args[1:], **given.kwargs)
        self._mode: str | None = getattr(self.args, "quantization_mode", None)
        self._teacher, self._own_teacher, self._saves_checkpoint = teacher_model, False, False
        if getattr(self.args, "enable_quantized_finetuning", False):
            self._mode = "finetune"
        self.stages = self._mode is not None
        if self._mode is None:
            return
        if self.model_init is not None:
            raise ConfigError(f"quantization_mode={self._mode!r} needs model=..., not model_init=...")
        if self._mode == "qat":
            self._prepare()
        if self._teacher is not None:
            self._teacher = self._teacher.to(self.args.device).eval()
        if finetune_state(self.model) is not None:
            self._freeze_scales()
            self._delay_rounding()
            if self.args.gradient_checkpointing and isinstance(self.model, PreTrainedModel):
                self.model.enable_input_require_grads()  # reentrant checkpoints need it: the embeddings are frozen
        if self._mode == "finetune" and self.args.distillation_weight and self._teacher is None:
            if not self.args.adapter_delay_steps:
                raise ConfigError(
                    f"distillation_weight={self.args.distillation_weight} has nobody to learn from: a quantized model "
                    "has no float one; give teacher_model=..., or adapter_delay_steps"
                )
            self._own_teacher = True

    def _prepare(self) -> None:
        args, model = self.args, self.model
        if qat_state(model) is None:
            config = args.quantization_config()
            # These do not keep the float weights, which the model would be its own teacher with.
            moves = args.qat_variant != "lora" or config.resolved_algorithm in CALIBRATED
            if args.distillation_weight and moves and self._teacher is None:
                self._teacher = teacher_copy(model)
            if args.qat_variant == "scales":
                self._mode = "finetune"
                quantize_to_train_scales(model, config, self._calibration_batches(config), args)
                return
            prepare_model_qat(
                model,
                config,
                variant=args.qat_variant,
                adapter_rank=args.adapter_rank,
                adapter_alpha=args.adapter_alpha,
                calibration_data=self._calibration_batches(config),
                progress=not args.disable_tqdm,
            )
        self._freeze_scales()
        # First, so that what it adds to the logs is there for every other callback.
        self.callback_handler.callbacks.insert(0, QatCallback(blend_steps=args.qat_blend_steps, convert=False))

    def _delay_rounding(self) -> None:
        steps, state = self.args.adapter_delay_steps, finetune_state(self.model)
        assert state is not None
        state.delay_steps = steps  # which a checkpoint has to agree with before training begins
        # To a model that it was, an adapter has nothing to add; it would only undo what calibration made of the codes.
        rests = bool(steps) and self.args.distillation_weight == 1 and self._teacher is None
        rests = rests and self.args.scale_learning_rate > 0
        batches = partial(self._first_batches, shared=True)
        callback = SavingFinetuneCallback(steps, batches, self._keep_teacher, rests)
        self.callback_handler.callbacks.insert(0, callback)

    def _keep_teacher(self, model: nn.Module) -> None:
        if self._own_teacher:
            self._teacher = unrounded_copy(model)

    def _freeze_scales(self) -> None:
        if self.args.scale_learning_rate == 0:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not name.endswith(SCALE_SUFFIX))

    def _calibration_batches(self, config: HfQuantConfig) -> Iterator[Any] | None:
        """What calibration of a float model sees; ``None`` where it needs no data.

        For static ranges of quantization-aware training, of which the maximum over all processes is taken, each takes
        its share.
        """
        calibrated = config.resolved_algorithm in CALIBRATED
        if not calibrated and not _is_static(config):
            return None
        return self._first_batches(shared=calibrated or self._mode == "ptq")

    def _first_batches(self, *, shared: bool) -> Iterator[Any]:
        """The first batches of the training data, in order; each process takes its share, or the same if ``shared``."""
        if self.train_dataset is None:
            raise ConfigError("calibration needs train_dataset: static ranges and calibrated codes come from it")
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "calibration"),
            generator=torch.Generator(),
        )
        rank, processes = (0, 1) if shared else (self.args.process_index, self.args.world_size)
        with torch.random.fork_rng():
            if shared:
                torch.manual_seed(self.args.seed)  # for collators that draw, in every process and after resuming
            yield from islice(loader, rank, self.args.calibration_batches * processes, processes)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; with ``quantization_mode="ptq"`` the model is quantized at the end.

        Raises:
            ConfigError: If weights are averaged, nothing would train, or the checkpoint to resume from is of another
                scheme.
        """
        if self._mode is not None:
            for callback in self.callback_handler.callbacks:
                if AVERAGING.search(type(callback).__name__):
                    raise ConfigError(
                        f"{type(callback).__name__} averages weights, and an average of grid points is not on the "
                        "grid; remove it to train with quantization"
                    )
        if self._mode == "ptq" and getattr(self.model, "is_quantized", False):
            raise ConfigError("the model was quantized when training ended; dequantize_model(model) to train on")
        if self._own_teacher:
            self._teacher = None  # of a run before
        result = super().train(*args, **kwargs)
        if self._mode == "ptq":
            config = self.args.quantization_config()
            data, progress = self._calibration_batches(config), not self.args.disable_tqdm
            quantize_model_ptq(self.model, config, calibration_data=data, progress=progress)
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As ``Trainer.create_optimizer``; scales get their own learning rate and no weight decay."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self._mode not in ("qat", "finetune"):
            return optimizer
        named = self.model.named_parameters()
        scales = {id(p): p for name, p in named if name.endswith(SCALE_SUFFIX) and p.requires_grad}
        in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not scales.keys() <= in_optimizer:
            raise ConfigError(
                "the optimizer was made before the model was prepared, and does not have its scales; pass "
                "optimizer_cls_and_kwargs instead of optimizers, or call prepare_model_qat(model, ...) first"
            )
        if scales and not given:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in scales]
            group = {"params": list(scales.values()), "lr": self.args.scale_learning_rate, "weight_decay": 0.0}
            if "eps" in optimizer.defaults:  # adam_epsilon may be there to move weights by the size of their gradients
                group["eps"] = SCALE_EPSILON
            optimizer.add_param_group(group)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As ``Trainer.compute_loss``; while training, mixed with distillation where the config asks for it."""
        distils = self._mode == "qat" or (self._mode == "finetune" and self._teacher is not None)
        weight = self.args.distillation_weight if distils and model.training else 0.0
        if weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        labels = inputs.get("labels")
        if weight == 1:
            loss, outputs = (
                torch.zeros((), device=self.args.device),
                model(**{key: value for key, value in inputs.items() if key != "labels"}),
            )
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        total, count = self._distil(outputs, inputs, labels)
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            divergence = total / num_items_in_batch * scale
        else:
            divergence = total / count.clamp_min(1)
        loss = (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _distil(self, outputs: Any, inputs: dict[str, Any], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if "logits" not in outputs:
            raise ConfigError("distillation_weight needs a model whose output has logits; or override compute_loss")
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad():
            theirs = self._teacher_outputs(inputs).logits
        ours, mask = outputs.logits, None
        if ours.ndim == 3:
            mask = inputs["attention_mask"].bool() if labels is None and "attention_mask" in inputs else None
            if labels is not None and labels.shape == ours.shape[:2]:
                mask = labels != -100
                inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # PEFT's
                if type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                    ours, theirs, mask = ours[:, :-1], theirs[:, :-1], mask[:, 1:]
        return distillation_loss(ours, theirs, mask, temperature=self.args.distillation_temperature)

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        if self._teacher is not None:
            return self._teacher(**inputs)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with bypassed(self.model):
                return self.model(**inputs)
        finally:
            for module in training:
                module.training = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saves_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        record, folder = training_record(self.model, self.args), Path(output_dir or self.args.output_dir)
        if not self._saves_checkpoint:
            check_rounded(self.model)
        packs = finetune_state(self.model) is not None
        if state_dict is not None and (packs or (qat_state(self.model) is not None and not self._saves_checkpoint)):
            raise ConfigError(
                "a model sharded by FSDP or DeepSpeed cannot be converted; load the checkpoint in one process"
            )
        if qat_state(self.model) is not None and not self._saves_checkpoint:
            with converted_model(self.model):
                super()._save(output_dir)
            return
        super()._save(output_dir, state_dict)
        if record is not None and self._saves_checkpoint and self.args.should_save:
            if packs:
                save_training_state(self.model, folder, self._teacher if self._own_teacher else None)
            write_record(folder, record)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_resumable(folder, training_record(self.model, self.args))
        if finetune_state(self.model) is not None:
            load_finetune_checkpoint_(self.model, folder)
            if self._own_teacher:
                step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
                self._teacher = load_teacher(self.model, folder) if step > self.args.adapter_delay_steps else None
            return
        if qat_state(self.model) is not None:
            _check_names(folder, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if finetune_state(self.model) is None:
            super()._load_best_model()
        else:
            load_finetune_checkpoint_(self.model, Path(self.state.best_model_checkpoint))


def _is_static(config: HfQuantConfig) -> bool:
    settings = config.resolve()
    return "static" in (settings.quantization_type, *(override.quantization_type for override in settings.overrides))


def _check_names(folder: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that lacks a tensor of ``model`` or has another one: the Trainer would only warn."""
    headers = read_headers(sorted(folder.glob("*.safetensors")))
    found = {name for header in headers.values() for name in header.tensors}
    expected = set(model.state_dict())
    tied = set(model.all_tied_weights_keys) if isinstance(model, PreTrainedModel) else set()
    missing, extra = sorted(expected - found - tied), sorted(found - expected)
    if missing or extra:
        raise FormatError(
            f"{folder}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}; it cannot be resumed"
        )

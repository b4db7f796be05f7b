"""The training state beside a checkpoint: what its packed model does not hold.

A checkpoint of fine-tuning is a folder that ``from_pretrained`` loads as the quantized model of that step. Beside its
``model.safetensors`` stands

    hfquant_training.safetensors   what the adapted modules started from, and what trains on them, under the names of
                                   the state dict (``nn/adapted_module.py``)
    hfquant_teacher.safetensors    the float model that training distils from, where it is the run's own

All other parameters are those of ``model.safetensors``.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import PreTrainedModel

from hfquant.errors import FormatError
from hfquant.finetune.adapted import load_training_tensors_, training_tensors
from hfquant.finetune.merge import merged_state_dict
from hfquant.hf.finetune import Model
from hfquant.hf.rounding import unrounded_copy
from hfquant.hf.source import checkpoint_files


TRAINING_STATE = "hfquant_training.safetensors"
TEACHER = "hfquant_teacher.safetensors"


def save_training_state(model: nn.Module, folder: Path, teacher: nn.Module | None = None) -> None:
    """Write the training state of ``model`` into the checkpoint ``folder``, and the ``teacher`` it distils from."""
    tensors = {name: tensor.contiguous() for name, tensor in training_tensors(model).items()}
    save_file(tensors, folder / TRAINING_STATE, metadata={"format": "pt"})
    if teacher is not None:
        save_model(teacher, str(folder / TEACHER))


def load_teacher(model: Model, folder: Path) -> Model:
    """The teacher of ``model``, as ``unrounded_copy`` made it, from the checkpoint ``folder``.

    Raises:
        FormatError: If the file is missing or damaged, or does not fit the model.
    """
    teacher = unrounded_copy(model)
    try:
        load_model(teacher, folder / TEACHER)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"{folder}/{TEACHER}: {error}; training cannot be resumed") from error
    return teacher


@torch.no_grad()
def load_finetune_checkpoint_(model: nn.Module, folder: Path) -> None:
    """Continue from the checkpoint ``folder``, in place: every tensor of ``model`` has to be there, and no other.

    Raises:
        FormatError: If a file is missing or damaged, or a tensor is missing, not expected, or of another shape.
    """
    if not (folder / TRAINING_STATE).is_file():
        raise FormatError(f"{folder}: {TRAINING_STATE} is not there; it is a quantized model, but cannot be resumed")
    try:
        training = load_file(folder / TRAINING_STATE)
        stored = {name: t for file in checkpoint_files(folder) for name, t in load_file(file).items()}
    except SafetensorError as error:
        raise FormatError(f"{folder}: {error}; a file is damaged") from error
    tied = set(model.all_tied_weights_keys) if isinstance(model, PreTrainedModel) else set()
    expected = merged_state_dict(model, checkpoint=True)
    missing, extra = sorted(expected.keys() - stored.keys() - tied), sorted(stored.keys() - expected.keys())
    if missing or extra:
        raise FormatError(
            f"{folder}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}; it cannot be resumed"
        )
    own, state = training_tensors(model), model.state_dict()
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise FormatError(
                f"{folder}: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}; it cannot be resumed"
            )
    try:
        load_training_tensors_(model, training)
    except FormatError as error:
        raise FormatError(f"{folder}/{TRAINING_STATE}: {error}") from error
    for name, tensor in stored.items():
        if name not in own:
            state[name].copy_(tensor)

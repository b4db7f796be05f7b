"""The modules of a model that are fine-tuned: finding them, what they hold, and what became of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.errors import FormatError
from hfquant.nn.adapted_experts import AdaptedExperts
from hfquant.nn.adapted_linear import AdaptedLinear
from hfquant.nn.adapted_module import TRAINED_SUFFIXES, AdaptedModule
from hfquant.nn.packed_module import PackedModule, companion_name
from hfquant.nn.quant_experts import QuantExperts
from hfquant.nn.quant_linear import QuantLinear


ADAPTED_AS: dict[type[PackedModule], type[AdaptedModule]] = {QuantLinear: AdaptedLinear, QuantExperts: AdaptedExperts}
"""The packed class -> the class that is fine-tuned in its place."""


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """All modules of ``model`` that are fine-tuned, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module


def training_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that the modules in training hold and a checkpoint of the packed model does not, by name.

    What training started from is part of it, so that it can be resumed without the first checkpoint.
    """
    found = {}
    for name, module in adapted_modules(model):
        for key in sorted(module.companions() | set(module.float_weights)):
            parameter = module._parameters.get(key)
            if parameter is not None:
                found[f"{name}.{key}" if name else key] = parameter.detach()
    return found


@torch.no_grad()
def load_training_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Continue from ``tensors``, which ``training_tensors`` gave for the same modules.

    Raises:
        FormatError: If a tensor is missing, not expected, or of another dtype or shape.
    """
    own = training_tensors(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise FormatError(f"missing tensors {missing[:5]}, unexpected tensors {extra[:5]}; it cannot be resumed")
    for name, tensor in own.items():
        given = tensors[name]
        if (given.dtype, given.shape) != (tensor.dtype, tensor.shape):
            raise FormatError(
                f"{name}: expected {tensor.dtype} {list(tensor.shape)}, found {given.dtype} {list(given.shape)}; "
                "it cannot be resumed"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@dataclass(frozen=True)
class Movement:
    """What fine-tuning changed in the packed weights.

    Attributes:
        codes: Codes of the adapted layers.
        codes_moved: Of those, how many differ from what training started from.
        scales: Scales of the adapted layers, of weights and of static activations.
        scales_moved: Of those, how many differ.
    """

    codes: int
    codes_moved: int
    scales: int
    scales_moved: int


@torch.no_grad()
def movement(model: nn.Module) -> Movement:
    """Count the codes and scales that fine-tuning has moved so far."""
    codes = codes_moved = scales = scales_moved = 0
    for _, module in adapted_modules(model):
        merged = module.merged()
        for key in module.float_weights:
            before = module.initial_codes(key)
            codes, codes_moved = codes + before.numel(), codes_moved + int((module.codes(key) != before).sum())
            for name in (companion_name(key, "scale"), companion_name(key, "input_scale")):
                stored = module._parameters.get(name)
                if stored is not None:
                    scales, scales_moved = scales + stored.numel(), scales_moved + int((merged[name] != stored).sum())
    return Movement(codes, codes_moved, scales, scales_moved)


@dataclass
class FinetuneState:
    """What a model in fine-tuning carries, on its quantizer.

    Attributes:
        adapter: ``"grid"`` or ``"scales"``.
        modules: Adapted module -> scheme.
        trained: Names of the float parameters that train along.
        rank: Of ``"grid"``, else ``None``.
        alpha: Of ``"grid"``, else ``None``.
        residual: Where ``"grid"`` has the residuals from: ``"ptq"`` kept them, ``"dither"`` stands for them, or
            ``"mixed"``; else ``None``.
        delay_steps: Optimizer steps for which the weights are not rounded yet.
        writes_checkpoints: Whether what is saved now is a checkpoint, beside which the training state stands: its
            packed model may be another than what is trained.
    """

    adapter: str
    modules: dict[str, str]
    trained: list[str]
    rank: int | None = None
    alpha: float | None = None
    residual: str | None = None
    delay_steps: int = 0
    writes_checkpoints: bool = False

    def record(self) -> dict[str, Any]:
        """What must be equal in a run and in the checkpoint it resumes from."""
        adapter = {"adapter": self.adapter, "adapter_rank": self.rank, "adapter_alpha": self.alpha}
        adapter |= {"adapter_delay_steps": self.delay_steps}
        return {"quantization_mode": "finetune"} | adapter | {"modules": self.modules, "trained": self.trained}

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """What ``config.json`` says of the fine-tuning of ``model``."""
        return {"adapter": self.adapter, "residual": self.residual} | vars(movement(model))


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of what is in memory for the adapted layers.

    Attributes:
        weights: Codes, scales, zero points and residuals: what does not train.
        learned_scales: The logarithms of learned scales.
        adapters: ``A`` and ``B``.
    """

    weights: int
    learned_scales: int
    adapters: int


def training_bytes(model: nn.Module) -> TrainingBytes:
    """What the adapted layers take; gradients and optimizer state are the optimizer's."""
    weights = learned_scales = adapters = 0
    for name, tensor in training_tensors(model).items():
        size = tensor.numel() * tensor.element_size()
        if name.endswith(("log_scale",)):
            learned_scales += size
        elif name.endswith(TRAINED_SUFFIXES):
            adapters += size
        else:
            weights += size
    return TrainingBytes(weights, learned_scales, adapters)

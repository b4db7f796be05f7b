"""Delayed quantization of ``adapter="grid"``: training without rounding at first, then onto the grid by calibration.

Every code that an adapter flips by itself adds an error of its own, where those of calibrated rounding cancel in the
output of a layer. So the first steps train weights that are not rounded, and the codes they end in are calibrated.

References:
    Jacob et al. 2018, section 3.1 ("quantization delay"), https://arxiv.org/abs/1712.05877.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hfquant.errors import ConfigError
from hfquant.finetune.adapted import adapted_modules
from hfquant.hf.calibration import read_calibration_data
from hfquant.hf.config import check_choice, check_integer
from hfquant.hf.finetune import Model, finetune_state
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.nn.adapted_module import AdaptedModule
from hfquant.ptq.calibrated import CalibrationOptions
from hfquant.ptq.recalibrated import Recalibration


ALGORITHMS = ("gptq", "signround")
"""That can round anew; the others change what is beside the weights, or look at no data."""


def set_rounding(model: nn.Module, on: bool) -> None:
    """Let a model in fine-tuning compute with its codes, or with what its adapters make of them before the rounding.

    Off, a weight is ``scale * (code + residual / 16 + alpha / rank * B @ A / initial_scale - zero_point)``, and scales
    of weights do not train (their gradient is zero). Such a model is neither saved nor merged before it is rounded.

    Raises:
        ConfigError: If the model is not in fine-tuning with ``adapter="grid"``, or its parameters are sharded.
    """
    for module in _layers(model).values():
        module.rounded = on


def is_rounded(model: nn.Module) -> bool:
    """Whether every layer in fine-tuning computes with its codes."""
    return all(module.rounded for _, module in adapted_modules(model))


@torch.no_grad()
def unrounded_copy(model: Model) -> Model:
    """A frozen bfloat16 copy of a model in fine-tuning that computes as it does with rounding off, to distil from.

    Activations are not quantized in it; tables and layers without an adapter are what they are in ``model``.

    Raises:
        ConfigError: As ``set_rounding``.
    """
    _layers(model)
    copied = copy.deepcopy(model)
    for module in _layers(copied).values():
        module.unround_()
    nn.Module.to(copied, torch.bfloat16)  # Transformers refuses it for quantized models
    return copied.requires_grad_(False).eval()


def round_anew(
    model: nn.Module,
    batches: Any,
    *,
    algorithm: str | None = None,
    iterations: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    optimizer: Any = None,
    progress: bool = True,
) -> None:
    """Round the weights of a model in fine-tuning by calibration, in place, as PTQ would round them; rounding is on.

    What is rounded are the weights as they are with rounding off, block by block, with one block in float at a time.
    Codes, scales and residuals are new afterwards, what adapters add to them is zero (``B``; ``A`` stays), and so are
    logarithms of weight scales; scales of static activations, and schemes, stay. Every parameter is the object it was.
    Where there are several processes, all have to call it, and take what the first has found.

    Args:
        model: In fine-tuning with ``adapter="grid"``.
        batches: As ``calibration_data`` of ``quantize_model_ptq``.
        algorithm: ``"gptq"`` or ``"signround"``; ``None`` takes what the model was quantized with, if it is one of
            them, else ``"gptq"``.
        iterations: Of ``"signround"``; ``None`` takes those that the model was quantized with.
        seed: Of the order of batches in ``"signround"``.
        tokenizer: For texts; ``None`` takes the one beside the model.
        optimizer: Forgets what it knows of adapters and weight scales, which start anew.
        progress: Show a progress bar.

    Raises:
        ConfigError: If the model is not in fine-tuning with ``adapter="grid"``, its parameters are sharded, or an
            argument is wrong.
        CalibrationError: If there is no usable data.
        SchemeError: If a weight holds NaN or infinity.
    """
    layers = _layers(model)
    quantizer: HfQuantQuantizer = model.hf_quantizer  # type: ignore[assignment]
    config = quantizer.quantization_config
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_integer("iterations", iterations, 1)
    data = read_calibration_data(model, batches, config, tokenizer)
    options = CalibrationOptions(
        algorithm=algorithm or next((a for a in ALGORITHMS if a == config.algorithm), ALGORITHMS[0]),
        iterations=iterations or config.iterations or CalibrationOptions.iterations,
        seed=seed,
        progress=progress,
    )
    Recalibration(model, layers, data.batches, options).run_()
    _share_(layers)
    if optimizer is not None:
        for module in layers.values():
            for name, parameter in module.trained().items():
                if not name.endswith("input_log_scale"):  # which goes on
                    optimizer.state.pop(parameter, None)


def _layers(model: nn.Module) -> dict[str, AdaptedModule]:
    """The layers with an adapter inside the rounding, by name."""
    state = finetune_state(model)
    if state is None or state.adapter != "grid":
        found = "is not in fine-tuning" if state is None else f"was prepared with adapter={state.adapter!r}"
        raise ConfigError(f"the model {found}; only adapter='grid' trains inside the rounding")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            "the model's parameters are sharded (FSDP2), and calibration needs whole ones: train with DDP, or without "
            "adapter_delay_steps"
        )
    return dict(adapted_modules(model))


@torch.no_grad()
def _share_(layers: dict[str, AdaptedModule]) -> None:
    """Give every process the packed tensors of the first: sums on a GPU may differ in the last bit, and then a code."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for module in layers.values():
        for name in sorted(module.companions() | set(module.float_weights)):
            parameter = module._parameters.get(name)
            if parameter is not None and not parameter.is_floating_point():
                dist.broadcast(parameter.view(torch.uint8), 0)  # as bytes: no backend sends int16

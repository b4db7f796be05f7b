"""``plan_quantization``: what quantizing a model will take and give, before any work."""

import copy
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hfquant.formats.headers import DTYPE_BYTES, read_header
from hfquant.hf.allocation import allocated_units, fixed_bytes, float_weights
from hfquant.hf.calibration import CALIBRATION_LENGTH, CALIBRATION_SAMPLES, calibration_options
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.quantizer import HfQuantQuantizer
from hfquant.nn.select import Selection
from hfquant.ptq.plan import Effort, Plan, make_plan
from hfquant.ptq.quantize_matrix import CALIBRATED


PROBE_SIZE, PROBE_RUNS = 512, 4


def plan_quantization(
    model: nn.Module | str | Path, config: HfQuantConfig | None = None, *, calibrated: bool | None = None
) -> Plan:
    """Size, memory, time, and what is kept, from config and file headers alone; no weight is read.

    Args:
        model: A float model, or its folder or Hub name.
        config: What to do; ``None`` takes the defaults.
        calibrated: Whether there will be calibration data; ``None`` says so if the config needs some.

    Raises:
        ConfigError: If a field is wrong or does not fit the model: group sizes that do not divide are listed here.
    """
    config = copy.deepcopy(config) if config is not None else HfQuantConfig()
    floats: Any = model if isinstance(model, nn.Module) else _on_meta(str(model))
    is_loaded = isinstance(model, nn.Module)
    element_size = next(floats.parameters()).element_size() if is_loaded else _element_size(str(model), floats)
    quantizer = HfQuantQuantizer(config, pre_quantized=False)
    quantizer.select(floats)
    static = any(scheme.quantization_type == "static" for scheme in quantizer.selection.schemes.values())
    needed = bool(calibrated) or static or config.algorithm in CALIBRATED
    if config.algorithm is None and calibrated:
        config.algorithm = "gptq"
    length = config.calibration_length or CALIBRATION_LENGTH
    effort = Effort(
        algorithm=config.resolved_algorithm,
        calibrated=needed,
        tokens=(config.calibration_samples or CALIBRATION_SAMPLES) * length,
        batch_tokens=4 * length,
        iterations=calibration_options(config, progress=False).iterations,
        element_size=element_size,
        flops=_measured_flops(),
        process_bytes=peak_process_bytes(),
        allocated=_allocated_bytes(floats, quantizer.selection, config),
    )
    text: Any = floats.config.get_text_config() if isinstance(floats, PreTrainedModel) else None
    return make_plan(floats, quantizer.selection, effort, getattr(text, "hidden_size", 0) or 0)


def _allocated_bytes(model: nn.Module, selection: Selection, config: HfQuantConfig) -> dict[str, int]:
    """Bytes of each layer whose bits will be chosen, at the average that the budget leaves; nothing if it says none."""
    budget = config.budget()
    if budget is None or budget.error is not None:
        return {}
    names = [name for unit in allocated_units(model, selection, config) for name in unit]
    weights = {name: sum(weight.numel for _, weight in float_weights(model, name)) for name in names}
    bits = budget.bits
    if bits is None:
        assert budget.size is not None
        bits = 8 * (budget.size - fixed_bytes(model, selection, names)) / sum(weights.values())
    return {name: int(count * bits / 8) for name, count in weights.items()}


def _on_meta(name: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name)
    classes = [getattr(transformers, c) for c in config.architectures or () if hasattr(transformers, c)]
    with torch.device("meta"):
        model: PreTrainedModel = classes[0](config) if classes else AutoModel.from_config(config)
    model.tie_weights()
    return model


def _element_size(name: str, model: PreTrainedModel) -> int:
    """Bytes of most float weights in the files; a Hub model that is not cached is taken at its config's dtype."""
    folder = Path(name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        dtype = getattr(model.config, "dtype", None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    largest = max(read_header(files[0]).tensors.values(), key=lambda tensor: torch.Size(tensor.shape).numel())
    return DTYPE_BYTES[largest.dtype]


def _measured_flops() -> float:
    x = torch.randn(PROBE_SIZE, PROBE_SIZE)
    x @ x
    started = time.perf_counter()
    for _ in range(PROBE_RUNS):
        x @ x
    return PROBE_RUNS * 2 * PROBE_SIZE**3 / max(1e-9, time.perf_counter() - started)


def peak_process_bytes() -> int:
    """The most memory this process had so far; 0 where the system does not say (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage starts with the peak of the process that forked this one
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    try:
        resource: Any = import_module("resource")
    except ImportError:
        return 0
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

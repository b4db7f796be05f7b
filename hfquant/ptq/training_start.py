"""Where training starts when it starts from calibrated PTQ: the weights that GPTQ or SignRound rounds, and its scales.

Calibrated codes are not the nearest ones of the original weight. They are the nearest ones of the weight that GPTQ
compensated, or that learned rounding moved, so that training which begins there computes at once what PTQ ships.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.nn.packed_module import PackedModule
from hfquant.nn.select import Selection, packed_class
from hfquant.numerics.packing import PackedWeight
from hfquant.ptq.calibrated import Calibration, CalibrationOptions
from hfquant.ptq.layer_result import stacked
from hfquant.ptq.quantize_matrix import MatrixResult
from hfquant.ptq.statistics import InputStatistics, WeightKey


@torch.no_grad()
def start_from_ptq_(
    model: nn.Module, selection: Selection, batches: Sequence[Any], options: CalibrationOptions
) -> dict[str, PackedWeight]:
    """Put into the float ``model`` the weights that calibrated PTQ rounds, in place; for that a copy is quantized.

    Norms change too where SmoothQuant or AWQ moves outliers through them. Tables and tied heads stay: they are
    quantized without data.

    Args:
        model: Float model in memory.
        selection: What will be quantized, and how; it is left as it is.
        batches: What the model is called with.
        options: How to calibrate.

    Returns:
        Parameter name -> the packed weight of PTQ: rounding the parameter to its scales gives its codes.

    Raises:
        CalibrationError: If activations are not finite, or a static layer was never reached.
        SchemeError: If a weight holds NaN or infinity.
    """
    calibrated = _Recorded(model, selection, batches, options)
    calibrated.run_()
    packed = [name for name, module in calibrated.model.named_modules() if isinstance(module, PackedModule)]
    for name, parameter in calibrated.model.named_parameters():
        if parameter.is_floating_point() and name.rpartition(".")[0] not in packed:
            model.get_parameter(name).copy_(parameter)
    for name in packed:
        bias = calibrated.model.get_submodule(name)._parameters.get("bias")
        if bias is not None:
            model.get_parameter(f"{name}.bias").copy_(bias)
    return calibrated.starts


class _Recorded(Calibration):
    """Calibrates a copy of a model, and writes what is rounded into the model itself.

    Attributes:
        starts: What the parameters written so far are rounded to.
    """

    def __init__(
        self, original: nn.Module, selection: Selection, batches: Sequence[Any], options: CalibrationOptions
    ) -> None:
        super().__init__(copy.deepcopy(original), copy.deepcopy(selection), batches, options)
        self.original, self.starts = original, dict[str, PackedWeight]()

    def pack_(
        self,
        name: str,
        module: nn.Module,
        results: Mapping[str, list[MatrixResult]],
        found: Mapping[WeightKey, InputStatistics],
    ) -> None:
        """As ``Calibration``; the float parameter of the original becomes what is rounded."""
        target = packed_class(module)
        assert target is not None
        for key, layout in target.weights_of(module).items():
            rows: Tensor = layout.to_rows(self.original.get_submodule(name).get_parameter(key))
            is_matrix = rows.ndim == 2
            for part, result in zip(rows.unsqueeze(0) if is_matrix else rows, results[key], strict=True):
                part.copy_(result.weight)
            self.starts[f"{name}.{key}"] = stacked([r.packed() for r in results[key]], is_matrix=is_matrix)
        super().pack_(name, module, results, found)

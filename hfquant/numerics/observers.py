"""Static INT8 ranges of activations, from what was seen of them during calibration."""

import math

import torch
from torch import Tensor

from hfquant.errors import CalibrationError
from hfquant.numerics.affine import fake_quantize, round_scale


PERCENTILE = 0.9999
"""Share of magnitudes that ``percentile`` covers; the rest saturates."""

MSE_RATIOS = tuple(0.02 * step for step in range(5, 51))
"""Of the largest magnitude: the ranges that ``mse`` tries."""


class AbsMaxObserver:
    """Largest magnitude of everything observed.

    Attributes:
        absmax: Largest ``|x|`` so far, in units of x; 0.0 before the first observation.
        rows: Rows observed.
    """

    def __init__(self) -> None:
        self.absmax = 0.0
        self.rows = 0

    def observe(self, x: Tensor) -> None:
        """Take in activations ``[..., K]``, any floating dtype.

        Raises:
            CalibrationError: If one of them is NaN or infinite.
        """
        if x.numel():
            largest = float(x.detach().abs().amax())
            if not math.isfinite(largest):
                raise CalibrationError("activations are NaN or infinite")
            self.absmax = max(self.absmax, largest)
            self.rows += x.numel() // x.shape[-1]

    def scale(self) -> Tensor:
        """Static INT8 scale ``[1]``, ``absmax / 127``, float32 and bfloat16-representable.

        Raises:
            CalibrationError: If nothing was observed.
        """
        if self.rows == 0:
            raise CalibrationError("no activation was observed")
        return round_scale(torch.tensor([self.absmax / 127]))


def choose_input_scale(sample: Tensor, absmax: Tensor, observer: str) -> Tensor:
    """Static INT8 scale ``[1]`` of activations, float32 and bfloat16-representable.

    Args:
        sample: Some of the activations ``[S, K]``, float32.
        absmax: Largest magnitude of all of them, a scalar.
        observer: ``"minmax"``: nothing that was seen saturates. ``"percentile"``: one in ten thousand does.
            ``"mse"``: the range with the least squared error over ``sample``.

    Raises:
        CalibrationError: If ``observer`` is another one.
    """
    largest = absmax.float().reshape(1)
    if observer == "minmax" or sample.numel() == 0:
        return round_scale(largest / 127)
    if observer == "percentile":
        magnitudes = sample.abs().flatten()
        rank = max(1, int(magnitudes.numel() * PERCENTILE))
        return round_scale(torch.kthvalue(magnitudes, rank).values.reshape(1) / 127)
    if observer == "mse":
        scales = [round_scale(largest * ratio / 127) for ratio in MSE_RATIOS]
        errors = [(fake_quantize(sample, scale, bits=8) - sample).square().sum() for scale in scales]
        return scales[int(torch.stack(errors).argmin())]
    raise CalibrationError(f"activation observer {observer!r}: expected minmax, percentile or mse")

"""Ranges of activations seen during calibration."""

import math

import torch
from torch import Tensor

from hfquant.errors import CalibrationError
from hfquant.numerics.affine import round_scale


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

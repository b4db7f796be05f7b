"""The only place with tolerances.

1. Integers are exact: ``torch.equal``.
2. Floats are judged by the dtype's own error: with the oracle in float64, the largest error (and the RMS error) of a
   result may be twice that of the plain formula in the same dtype (three times for gradients), plus a floor.
3. Quantization error has a bound: half a step, plus what rounding the scale to bfloat16 can clip.
"""

import torch
from torch import Tensor


FACTOR = 2.0
GRADIENT_FACTOR = 3.0

FLOORS = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of the largest oracle value: a few float32 roundings, or half a unit in the last place of the result's dtype."""

PRECISION_ERRORS = {"highest": 1e-6, "high": 2**-13, "medium": 2**-7}
"""``torch.set_float32_matmul_precision`` -> largest error of a weight-only layer in float32, of the largest result."""

SAME_VALUES = {"rtol": 1e-5, "atol": 1e-6}
"""Float32 results of the same values added up in another order."""

GELU = {"rtol": 2.5e-7, "atol": 3e-8}
"""Native GELU in float32 beside the exact one: two roundings, and what is cut off where it is nearly zero."""

TORCH_GELU = {"rtol": 1e-6, "atol": 2e-6}
"""Torch's own, which loses 1.3e-6 where the error function is nearly -1."""

SAME_ADAPTER = {"rtol": 1e-5, "atol": 1e-5}
"""Float32 outputs near 1 of a tiny model whose adapter an SVD took apart and put together: 5e-7 of their norm."""

SQNR_FLOORS_DB = {(8, None): 40.0, (4, 32): 19.0, (4, 64): 18.0, (4, 128): 17.5}
"""(bits, group size) -> signal to noise of round to nearest on N(0, 1) weights [256, 4096], 1 dB below measured."""

NATIVE_SQNR_DB = 60.0
"""Of a model on native kernels against the same model as it was trained, in float32."""

BFLOAT16_SQNR_DB = 30.0
"""Of a tiny model in bfloat16 against the same model in float32."""

ASYMMETRIC_SQNR_FLOORS_DB = {(4, 32): 20.5, (4, 64): 19.5, (4, 128): 18.5}

SEARCH_SQNR_FLOORS_DB = {
    (True, 32): 21.3,
    (True, 64): 20.4,
    (True, 128): 19.6,
    (False, 32): 22.0,
    (False, 64): 20.9,
    (False, 128): 20.0,
}
"""(symmetric, group size) -> the same at 4 bits for ``search``: above round to nearest, 0.2 to 0.4 dB below."""


def assert_close(result: Tensor, oracle: Tensor, plain: Tensor, *, factor: float = FACTOR) -> None:
    """Assert that ``result`` is as near to the float64 ``oracle`` as ``plain``, the formula in the same dtype, is."""
    result, oracle, plain = result.detach(), oracle.detach(), plain.detach()
    assert result.shape == oracle.shape
    assert oracle.dtype == torch.float64
    if oracle.numel() == 0:
        return
    error, allowed = (result.double() - oracle).abs(), (plain.double() - oracle).abs()
    floor = FLOORS[result.dtype] * float(oracle.abs().max())
    for name, measure in (("largest", torch.amax), ("RMS", _rms)):
        found, limit = float(measure(error)), factor * float(measure(allowed)) + floor
        worst = int(error.flatten().argmax())
        values = float(result.flatten()[worst]), float(oracle.flatten()[worst])
        message = f"{name} error {found:.3e} > {limit:.3e}; worst at {worst}: {values[0]!r}, oracle {values[1]!r}"
        assert found <= limit, message


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()

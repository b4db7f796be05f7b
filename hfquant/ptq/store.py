"""Where a run keeps what is finished, so that an interrupted one goes on, and memory holds one block at a time."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from hfquant.numerics.packing import PackedWeight
from hfquant.ptq.quantize_weight import QuantizedWeight, quantize_weight
from hfquant.schemes import WeightScheme


PACKED_NAMES = ("codes", "scale", "zero_point")


class Store(Protocol):
    """Keeps finished parts: weights, blocks, decisions."""

    def load(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved as ``part``, if it was."""

    def save(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
        """Keep ``part``; returns its tensors as they are kept, which may be outside of memory."""


def quantize_and_keep(
    rows: Tensor, scheme: WeightScheme, *, algorithm: str, name: str, store: Store | None
) -> QuantizedWeight:
    """``quantize_weight``, or its result from an interrupted run.

    Args:
        rows: ``[..., N, K]``, any floating dtype.
        scheme: Bits, group size, symmetry.
        algorithm: What chooses the scales.
        name: Of the parameter.
        store: Keeps the result, or has it already; ``None`` leaves it in memory.

    Raises:
        SchemeError: If ``rows`` hold NaN or infinity.
    """
    found = None if store is None else store.load(name)
    if found is None:
        result = quantize_weight(rows, scheme, algorithm=algorithm, name=name)
        if store is None:
            return result
        tensors = {n: t for n, t in zip(PACKED_NAMES, result.packed, strict=True) if t is not None}
        record = {"sqnr_db": result.sqnr_db}
        found = store.save(name, tensors, record), record
    tensors, record = found
    packed = PackedWeight(tensors["codes"], tensors["scale"], tensors.get("zero_point"))
    return QuantizedWeight(packed, record["sqnr_db"])

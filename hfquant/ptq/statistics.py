"""What is kept of the inputs of each layer during calibration.

Layers that read the very same tensor (query, key and value projections) share one ``InputStatistics``. Fused experts
have one for each expert and parameter, from the tokens that were routed to it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hfquant.errors import CalibrationError
from hfquant.nn.quant_experts import QuantExperts
from hfquant.nn.select import packed_class


HELD_OUT_SHARE = 8
"""One row in so many is held out: scales and codes are chosen on the others, and judged on these."""

SAMPLE_ROWS = 2048
"""Rows kept as they are, for ranges of activations and for measuring layers."""


class WeightKey(NamedTuple):
    """One weight matrix: module name, parameter name, and the expert where there are several."""

    module: str
    parameter: str
    expert: int | None = None

    def __str__(self) -> str:
        name = f"{self.module}.{self.parameter}"
        return name if self.expert is None else f"{name}[{self.expert}]"


@dataclass
class InputStatistics:
    """Second moments of the inputs ``x [M, K]`` of a layer.

    Attributes:
        hessian: ``sum x x^T [K, K]``, float32, of the rows to calibrate on.
        held_out: The same of the rows that are held out.
        rows: Rows in ``hessian``.
        held_rows: Rows in ``held_out``.
        absmax: Largest magnitude of each input ``[K]``.
        sample: Some of all rows ``[S, K]``, in float32.
    """

    hessian: Tensor
    held_out: Tensor
    rows: int
    held_rows: int
    absmax: Tensor
    sample: Tensor

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> "InputStatistics":
        """Nothing seen yet, for rows of ``in_features``."""
        square = torch.zeros(in_features, in_features, device=device)
        none = torch.zeros(0, in_features, device=device)
        return cls(square, square.clone(), 0, 0, torch.zeros(in_features, device=device), none)

    def add(self, x: Tensor, *, held: bool, sample_rows: int) -> None:
        """Take in rows ``x [M, K]``; ``held`` rows are for judging only.

        Raises:
            CalibrationError: If they are not finite.
        """
        if x.shape[0] == 0:
            return
        x = x.float()
        largest = x.abs().amax(0)
        if not bool(torch.isfinite(largest).all()):
            raise CalibrationError("activations are NaN or infinite; check the model and the calibration data")
        self.absmax = torch.maximum(self.absmax, largest)
        (self.held_out if held else self.hessian).addmm_(x.t(), x)
        if held:
            self.held_rows += x.shape[0]
        else:
            self.rows += x.shape[0]
        if sample_rows:
            step = max(1, x.shape[0] // sample_rows)
            self.sample = torch.cat((self.sample, x[::step][:sample_rows].clone()))

    def rescale_(self, factors: Tensor) -> None:
        """The inputs are from now on divided by ``factors [K]``."""
        for moments in (self.hessian, self.held_out):
            moments.div_(factors).div_(factors.unsqueeze(1))
        self.absmax = self.absmax / factors
        self.sample = self.sample / factors

    def judging(self) -> Tensor:
        """The moments to judge by, ``[K, K]``: of held out rows where there are some."""
        return self.held_out if self.held_rows else self.hessian


class Collector:
    """Fills the statistics of layers while their block runs.

    Attributes:
        found: Weight -> statistics of its inputs; shared between weights with the same input.
    """

    def __init__(self, layers: Mapping[str, nn.Module], batches: int) -> None:
        self.found: dict[WeightKey, InputStatistics] = {}
        self._layers = layers
        self._batches, self._batch = batches, -1
        self._leaders: dict[WeightKey, WeightKey] = {}
        self._seen: list[tuple[Tensor, WeightKey]] = []
        self._mask: Tensor | None = None

    def next_batch(self, mask: Tensor | None = None) -> None:
        """The next call of the block begins; rows where ``mask [B, T]`` is 0 are padding and are left out."""
        self._batch += 1
        self._seen = []
        self._mask = mask

    def observe(self, key: WeightKey, x: Tensor) -> None:
        """Take in the input ``x [..., K]`` of the weight ``key``."""
        if key not in self._leaders:
            self._leaders[key] = self._leader(key, x)
        leader = self._leaders[key]
        if leader != key:
            self.found[key] = self.found[leader]
            return
        rows = x[self._mask.bool()] if self._mask is not None and self._mask.shape == x.shape[:-1] else x
        rows = rows.detach().reshape(-1, x.shape[-1])
        if key not in self.found:
            self.found[key] = InputStatistics.empty(x.shape[-1], x.device)
        try:
            self._add(self.found[key], rows)
        except CalibrationError as error:
            raise CalibrationError(f"{key}: {error}") from None

    def _leader(self, key: WeightKey, x: Tensor) -> WeightKey:
        for other, owner in self._seen:
            if other is x:
                return owner
        if key.expert is None:
            self._seen.append((x, key))
        return key

    def _add(self, statistics: InputStatistics, rows: Tensor) -> None:
        sample = -(-SAMPLE_ROWS // self._batches)
        held = self._batches // HELD_OUT_SHARE
        if held:
            statistics.add(rows, held=self._batch >= self._batches - held, sample_rows=sample)
            return
        cut = rows.shape[0] - rows.shape[0] // HELD_OUT_SHARE
        statistics.add(rows[:cut], held=False, sample_rows=sample)
        statistics.add(rows[cut:], held=True, sample_rows=sample)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the layers for the time of the block."""
        handles, swapped = [], []
        for name, module in self._layers.items():
            if packed_class(module) is QuantExperts:
                swapped.append((module, type(module)))
                _watch_experts_(module, name, self)
            else:
                handles.append(module.register_forward_pre_hook(_linear_hook(name, self)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, kind in swapped:
                module.__class__ = kind
                for attribute in ("float_class", "float_weights", "collector", "layer_name"):
                    del module.__dict__[attribute]
            self._seen = []


def _linear_hook(name: str, collector: Collector) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        collector.observe(WeightKey(name, "weight"), args[0])

    return hook


class _WatchedExperts(QuantExperts):
    """Experts that route like the packed ones, on float weights, and show each expert's inputs."""

    collector: Collector
    layer_name: str

    @staticmethod
    def input_observer(name: str, x: Tensor) -> None:
        """Being there makes the experts run one by one."""

    def _linear(self, name: str, expert: int | Tensor, x: Tensor) -> Tensor:
        assert isinstance(expert, int)
        self.collector.observe(WeightKey(self.layer_name, name, expert), x)
        weight = self.float_weights[name].to_rows(self.get_parameter(name))[expert]
        bias = self._parameters.get(f"{name}_bias")
        return linear(x, weight, None if bias is None else bias[expert])


def _watch_experts_(module: Any, name: str, collector: Collector) -> None:
    module.float_class, module.float_weights = type(module), QuantExperts.weights_of(module)
    module.collector, module.layer_name = collector, name
    module.__class__ = _WatchedExperts

"""What an error in each weight costs the output of a model, measured with gradients on calibration data.

For a small error ``E`` of one weight matrix the output moves by ``KL(original || quantized) = 1/2 vec(E)^T F vec(E)``
with the Fisher information ``F = E[g g^T]`` of the gradients ``g`` of ``log p(label)``, labels drawn from the model
itself (Martens 2020, section 8, https://arxiv.org/abs/1412.1193). Of F the diagonal is kept, and of that a row and a
column factor (Shazeer and Stern 2018, eq. 5, https://arxiv.org/abs/1804.04235): ``F_ij = r_i c_j / sum(r)``. A model
without logits gives the relative squared error of its output ``y`` instead, from random projections: the same formula,
with ``g`` the gradient of ``sqrt(2) v . y / |y|`` for normally distributed ``v``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError
from hfquant.nn.packed_module import FloatWeight
from hfquant.ptq.blocks import hidden_of, quiet_model
from hfquant.ptq.calibrate import run_batch


SAMPLES = 8
"""Rows of calibration data that gradients are taken on, spread over all batches."""


@dataclass
class Sensitivity:
    """The factors of one weight ``[..., N, K]``: an error ``E`` costs ``1/2 sum E_ij^2 r_i c_j / sum(r)``.

    Attributes:
        rows: ``r [..., N]``: squared gradients, summed over the inputs.
        columns: ``c [..., K]``: the same, summed over the outputs.
    """

    rows: Tensor
    columns: Tensor

    def add(self, gradient: Tensor) -> None:
        """Take in the gradient ``[..., N, K]`` of one sample."""
        squared = gradient.float().square()
        self.rows += squared.sum(-1)
        self.columns += squared.sum(-2)

    def importance(self, count: float) -> tuple[Tensor, Tensor]:
        """``r / (2 sum(r) count)`` and ``c``: what squared errors are multiplied with, for ``count`` units."""
        total = self.rows.sum(-1, keepdim=True).clamp_min(1e-30)
        return self.rows / (2 * total * count), self.columns


@dataclass(frozen=True)
class Measured:
    """Sensitivities of a model's weights.

    Attributes:
        kind: ``"kl"`` (nats for each prediction) or ``"relative error"`` (of the output's energy).
        factors: Parameter name -> what squared errors of its rows and columns cost.
    """

    kind: str
    factors: Mapping[str, tuple[Tensor, Tensor]]


def measure_sensitivity(
    model: nn.Module, weights: Mapping[str, FloatWeight], batches: Sequence[Any], *, seed: int, progress: bool
) -> Measured:
    """Run ``model`` forwards and backwards on some of ``batches``.

    Args:
        model: Float model in memory.
        weights: Parameter name -> its shape and orientation, for the parameters to measure.
        batches: What the model is called with.
        seed: Of labels and projections.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If gradients are not finite.
    """
    device = next(model.parameters()).device
    found = {
        name: Sensitivity(
            torch.zeros(w.shape[:-1], device=device), torch.zeros((*w.shape[:-2], w.shape[-1]), device=device)
        )
        for name, w in weights.items()
    }
    generator = torch.Generator(device).manual_seed(seed)
    samples, count, kind = _spread(batches), 0, ""
    with quiet_model(model), _gradients(model, weights, found), torch.enable_grad():
        for batch in tqdm(samples, desc="Sensitivity", unit="sample", disable=not progress):
            loss, units, kind = _objective(run_batch(model, batch), batch, generator)
            loss.backward()
            count += units
    bad = [name for name, sensitivity in found.items() if not bool(torch.isfinite(sensitivity.rows).all())]
    if bad:
        raise CalibrationError(f"{bad[0]}: gradients are NaN or infinite; check the model and the calibration data")
    return Measured(kind, {name: sensitivity.importance(count) for name, sensitivity in found.items()})


@contextmanager
def _gradients(
    model: nn.Module, weights: Mapping[str, FloatWeight], found: Mapping[str, Sensitivity]
) -> Iterator[None]:
    """Take in the gradient of each of ``weights`` as soon as it is there, and no other's."""

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            found[name].add(weights[name].to_rows(parameter.grad))
            parameter.grad = None

        return take

    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handles = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in weights)
        if name in weights:
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _objective(output: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, int, str]:
    """What to take gradients of, how many units it sums over, and what it measures."""
    logits = getattr(output, "logits", None)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(logits, Tensor) and logits.shape[-1] > 1:
        logp = torch.log_softmax(logits.float(), -1)
        kept = logp[mask.bool()] if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else logp
        kept = kept.reshape(-1, kept.shape[-1])
        labels = torch.multinomial(kept.detach().exp(), 1, generator=generator)
        return kept.gather(-1, labels).sum(), kept.shape[0], "kl"
    y = hidden_of(output).float()
    if isinstance(mask, Tensor) and mask.shape == y.shape[:-1]:
        y = y[mask.bool()]
    v = torch.randn(y.shape, generator=generator, device=y.device)
    return 2**0.5 * (v * y).sum() / y.detach().norm().clamp_min(1e-30), 1, "relative error"


def _spread(batches: Sequence[Any]) -> list[Any]:
    """Up to ``SAMPLES`` rows of ``batches``, evenly spread; batches that cannot be taken apart count as one row."""
    rows = [row for batch in batches for row in _rows(batch)]
    step = max(1, len(rows) // SAMPLES)
    return rows[::step][:SAMPLES]


def _rows(batch: Any) -> list[Any]:
    if not isinstance(batch, Mapping):
        return [batch]
    sizes = {value.shape[0] if value.ndim else 0 for value in batch.values() if isinstance(value, Tensor)}
    if len(sizes) != 1 or 0 in sizes:
        return [batch]
    return [
        {key: value[index : index + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for index in range(sizes.pop())
    ]

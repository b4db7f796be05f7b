"""Learned rounding: gradient descent on where each weight of a block rounds to, and on the scales.

A weight is ``clamp(round(w / s + v)) * s`` with ``s = s0 * a``; ``v`` in [-1/2, 1/2] and ``a`` near 1 are learned so
that the block, on quantized inputs, returns what the float block returned on float inputs: an error counts relative to
the size of its token, and that token as much as it is large. ``w`` starts as GPTQ's compensated weight, so that the
first step already is GPTQ. Where the published algorithm steps by the sign of a gradient, ``v`` steps by Adam: signs
forget sizes, so that many small gradients outvote a large one that outweighs them.

References:
    Cheng et al. 2023, algorithm 1. https://arxiv.org/abs/2309.05516
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hfquant.numerics.affine import code_range, round_scale
from hfquant.ptq.blocks import relative_error
from hfquant.ptq.gptq import Grid
from hfquant.ptq.quantize_matrix import MatrixResult


BETAS = (0.9, 0.98)
"""Of Adam: its means must settle within the 50 steps of a short run."""

SCALE_STEP = 0.1
"""Learning rate of the scales, which step by signs, as a share of that of the rounding."""

SCALE_RANGE = (0.9, 1.1)
"""How far a scale may move from where it started."""


class _FakeWeight(torch.autograd.Function):
    """Values on the grid of ``w``, ``v`` and ``a``; gradients pass straight through the rounding, not the clamp."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, a: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        """Values ``[N, K]`` of ``w [N, K]`` with ``v [N, K]``, ``a`` and ``scale [N, K // G, 1]``."""
        s = round_scale(scale * a)
        smallest, largest = code_range(bits)
        shift = torch.zeros(1, device=s.device) if zero is None else zero
        steps = w.view(*s.shape[:2], -1) / s
        codes = (steps + v.view_as(steps)).round_()
        clipped = codes.clamp(smallest - shift, largest - shift)
        inside = clipped == codes
        ctx.save_for_backward(s, torch.where(inside, clipped - steps, clipped), inside, scale)
        return (clipped * s).view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``v`` and ``a``."""
        s, slope, inside, scale = ctx.saved_tensors
        groups = grad.view_as(slope)
        return (
            None,
            (groups * s * inside).view_as(grad),
            (groups * slope).sum(-1, keepdim=True) * scale,
            None,
            None,
            None,
        )


@dataclass
class _Learned:
    """One matrix whose rounding is learned."""

    result: MatrixResult
    v: Tensor
    a: Tensor

    @classmethod
    def start(cls, result: MatrixResult) -> "_Learned":
        """Nothing learned yet."""
        a = torch.ones_like(result.grid.scale).unsqueeze(-1).requires_grad_()
        return cls(result, torch.zeros_like(result.weight, requires_grad=True), a)

    def values(self) -> Tensor:
        """The weight on its grid ``[N, K]``, with gradients to ``v`` and ``a``."""
        grid = self.result.grid
        zero = None if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
        out: Tensor = _FakeWeight.apply(self.result.weight, self.v, self.a, grid.scale.unsqueeze(-1), zero, grid.bits)  # type: ignore[no-untyped-call]
        return out

    @torch.no_grad()
    def finish_step_(self, rate: float) -> None:
        """After the optimizer's step of ``v``: back into its range, and a step of the scales by signs."""
        assert self.a.grad is not None
        self.v.clamp_(-0.5, 0.5)
        self.a.sub_(self.a.grad.sign_(), alpha=rate * SCALE_STEP).clamp_(*SCALE_RANGE)
        self.a.grad = None

    def finished(self) -> MatrixResult:
        """What was learned, as a grid and what is rounded to it."""
        with torch.no_grad():
            old = self.result.grid
            scale = round_scale(old.scale * self.a.squeeze(-1))
            grid = Grid(scale, old.zero_point, old.group_size, old.bits)
            weight = self.result.weight + self.v * grid.expanded(scale)
        return replace(self.result, grid=grid, weight=weight, method="signround")


@dataclass(frozen=True)
class Task:
    """What a block should do on one batch.

    Attributes:
        run: Calls the block on quantized inputs; its hidden states.
        target: Hidden states of the float block on float inputs.
        mask: Rows that count ``[B, T]``; ``None`` means all.
    """

    run: Callable[[], Tensor]
    target: Tensor
    mask: Tensor | None = None

    def loss(self) -> Tensor:
        """Mean over the rows that count of their relative squared error, times their size in median sizes.

        With nothing but relative errors a token that all others attend to (of 180 times their size in SmolLM2) would
        go wrong unnoticed; with nothing but squared errors it would be the only one that counts.
        """
        error = relative_error(self.run(), self.target)
        size: Tensor = torch.linalg.vector_norm(self.target.float(), dim=-1)
        if self.mask is not None:
            error, size = error[self.mask.bool()], size[self.mask.bool()]
        return (error * size / size.median().clamp_min(1e-30)).mean()


def learn_rounding(
    modules: Mapping[str, nn.Module],
    results: Mapping[str, MatrixResult],
    tasks: Sequence[Task],
    *,
    iterations: int,
    seed: int,
) -> dict[str, MatrixResult]:
    """Better codes and scales for the linear layers of one block, or the old ones where they are not.

    Args:
        modules: Float layers of the block, by name.
        results: Where each starts.
        tasks: One for each batch; the last eighth judges, and is not learned from.
        iterations: Steps; the learning rate starts at ``1 / iterations`` and falls linearly to 0.
        seed: Of the order of batches.
    """
    learned = {name: _Learned.start(result) for name, result in results.items()}
    held = max(1, len(tasks) // 8) if len(tasks) > 1 else 0
    training, judging = tasks[: len(tasks) - held], tasks[len(tasks) - held :] or tasks
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([matrix.v for matrix in learned.values()], betas=BETAS, eps=1e-20)
    with _patched(modules, learned):
        before = _mean_loss(judging)
        for step in range(iterations):
            task = training[int(torch.randint(len(training), (1,), generator=order))]
            with torch.enable_grad():
                task.loss().backward()
            rate = optimizer.param_groups[0]["lr"] = (1 - step / iterations) / iterations
            optimizer.step()
            optimizer.zero_grad()
            for matrix in learned.values():
                matrix.finish_step_(rate)
        after = _mean_loss(judging)
    if after < before:
        return {name: matrix.finished() for name, matrix in learned.items()}
    return {name: replace(r, note="learned rounding was worse on held-out batches") for name, r in results.items()}


@torch.no_grad()
def _mean_loss(tasks: Sequence[Task]) -> float:
    return sum(float(task.loss()) for task in tasks) / len(tasks)


@contextmanager
def _patched(modules: Mapping[str, nn.Module], learned: Mapping[str, _Learned]) -> Iterator[None]:
    """Let each layer compute with its learned weight; other parameters of the block get no gradients."""

    def forward(module: Any, matrix: _Learned) -> Callable[[Tensor], Tensor]:
        return lambda x: linear(x, matrix.values().to(x.dtype), module.bias)

    patched: dict[str, Any] = {name: modules[name] for name in learned}
    frozen = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for name, module in patched.items():
        module.forward = forward(module, learned[name])
    try:
        yield
    finally:
        for module in patched.values():
            del module.forward
        for parameter in frozen:
            parameter.requires_grad_(True)

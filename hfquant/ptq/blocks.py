"""The blocks of a model, found in its module tree, and the calls they receive.

A stack is an outermost ``nn.ModuleList`` whose entries hold layers that are to be quantized: the decoder layers of a
language model, the layers of an encoder, both of an encoder-decoder. No architecture is named anywhere.

Where the output of each block is the input of the next (checked on one batch, not assumed), the calls of all blocks
are recorded in one pass that computes the first block only; every other block hands its input on. Elsewhere each
block's calls are recorded by running the model up to it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.ptq.calibrate import run_batch


class _Stop(Exception):
    """Ends a forward pass once everything wanted was seen."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block; its hidden states stand at ``key``.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        key: Index into ``args`` or name in ``kwargs`` of the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    @property
    def hidden(self) -> Tensor:
        """The hidden states ``[..., K]``."""
        found: Tensor = self.args[self.key] if isinstance(self.key, int) else self.kwargs[self.key]
        return found

    def with_hidden(self, hidden: Tensor | None) -> "Call":
        """The same call on other hidden states."""
        if isinstance(self.key, int):
            return replace(self, args=(*self.args[: self.key], hidden, *self.args[self.key + 1 :]))
        return replace(self, kwargs=self.kwargs | {self.key: hidden})

    def run(self, block: nn.Module) -> Tensor:
        """The hidden states that ``block`` returns."""
        return hidden_of(block(*self.args, **self.kwargs))


def make_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Find the hidden states among the arguments: the first floating tensor."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return Call(args, dict(kwargs), index)
    named = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if named:
        return Call(args, dict(kwargs), "hidden_states" if "hidden_states" in named else named[0])
    return Call((None, *args), dict(kwargs), 0)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: itself, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    found: Tensor = next(value for value in values if isinstance(value, Tensor))
    return found


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Energy of ``got - wanted [..., H]`` as a share of that of ``wanted``, for each token ``[...]``, float32.

    A norm reads what a block returns and sees nothing else; the first token of a language model can have more energy
    than all others together, and would be the only one that counts in a plain mean.
    """
    energy = wanted.float().square().sum(-1)
    floor = (1e-6 * energy.mean()).clamp_min(1e-30)  # a row of zeros must not count more than all others
    return (got.float() - wanted.float()).square().sum(-1) / energy.clamp_min(floor)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, Tensor):
        return hidden
    return (hidden, *tuple(output)[1:])


def find_stacks(model: nn.Module, layers: Iterable[str]) -> list[list[str]]:
    """Names of the blocks of each stack, in the order of the module tree.

    Args:
        model: Any model.
        layers: Names of the modules that are to be quantized; a list that holds none of them is no stack.
    """
    wanted, stacks = list(layers), []
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{other}.") for other in outer):
            continue
        blocks = [f"{name}.{child}" for child, _ in module.named_children()]
        if len(blocks) > 1 and all(any(layer.startswith(f"{b}.") for layer in wanted) for b in blocks):
            stacks.append(blocks)
            outer.append(name)
    return stacks


@torch.no_grad()
def is_chain(model: nn.Module, blocks: Sequence[str], batch: Any) -> bool:
    """Whether each block is called once and takes exactly what the block before it returned."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((name, make_call(args, kwargs).hidden, hidden_of(output)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name), with_kwargs=True) for name in blocks]
    try:
        with quiet_model(model):
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    linked = all(
        isinstance(after[1], Tensor) and before[2].shape == after[1].shape and torch.equal(before[2], after[1])
        for before, after in zip(calls, calls[1:], strict=False)
    )
    return linked and [call[0] for call in calls] == list(blocks)


@torch.no_grad()
def record_calls(
    model: nn.Module, blocks: Sequence[str], batches: Iterable[Any], *, pass_through: bool
) -> dict[str, list[Call]]:
    """The calls that ``blocks`` receive; each forward pass stops at the last of them.

    Args:
        model: Model whose earlier blocks are quantized already.
        blocks: Names; of one stack, in the order they run.
        batches: What the model is called with.
        pass_through: Compute the first block only and let the others return their input; only the first call then
            keeps its hidden states.
    """
    calls: dict[str, list[Call]] = {name: [] for name in blocks}
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in blocks}
    originals = {name: module.__dict__.get("forward") for name, module in modules.items()}
    first_output: list[Any] = [None]

    def recorder(name: str) -> Callable[..., Any]:
        forward = modules[name].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            call = make_call(args, kwargs)
            is_first = name == blocks[0]
            calls[name].append(call if is_first or not pass_through else call.with_hidden(None))
            if name == blocks[-1]:
                raise _Stop
            if is_first or not pass_through:
                first_output[0] = forward(*args, **kwargs)
            return _with_hidden(first_output[0], call.hidden) if pass_through else first_output[0]

        return run

    for name, module in modules.items():
        module.forward = recorder(name)
    try:
        with quiet_model(model):
            for batch in batches:
                _run_until_stopped(model, batch)
    finally:
        for name, module in modules.items():
            del module.forward
            if originals[name] is not None:
                module.forward = originals[name]
    return calls


def _run_until_stopped(model: nn.Module, batch: Any) -> None:
    try:
        run_batch(model, batch)
    except _Stop:
        return


@contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without caches, for the time of a block."""
    training = [module for module in model.modules() if module.training]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]
        for module in training:
            module.training = True

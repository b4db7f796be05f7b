"""Defines the ops of the ``hfquant`` library and says which implementation of each runs, and why.

Every op has a reference in plain torch, which runs everywhere. On a CPU the native kernels (``native.py``) run what
they support; other devices register theirs with ``torch.library`` on the same op.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hfquant.kernels import native


_LIBRARY = torch.library.Library("hfquant", "DEF")


class Implementation(NamedTuple):
    """One way to compute an op.

    Attributes:
        device: Device type it runs on, or ``any``.
        name: Short name, as in ``avx512`` or ``reference``.
        runs: Whether it is used in this process.
        reason: Why it is, or why not.
    """

    device: str
    name: str
    runs: bool
    reason: str


OPS: dict[str, list[Callable[[], Implementation]]] = {}
"""Op -> what can compute it, the best first; each entry is asked when the table is shown."""


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native_op: str | None = None,
    supports: Callable[..., bool] = lambda *_: True,
) -> None:
    """Define ``hfquant::<schema>`` with its plain torch implementation for every device.

    Args:
        schema: Name, arguments and results, as in ``"scale_rows(Tensor x, Tensor scale) -> Tensor"``.
        reference: The implementation used where no faster one is registered.
        fake: Same arguments; returns empty tensors of the right shape, dtype and device, for tracing.
        native_op: Name of an op with the same schema for which the native library has a CPU implementation.
        supports: Same arguments; whether that implementation can take them.
    """
    name = schema.partition("(")[0]
    OPS[name] = [lambda: Implementation("any", "reference", True, "plain torch, for whatever nothing above takes")]
    if native_op is None:
        _define(name, schema, reference, fake)
        return
    OPS[name].insert(0, lambda: Implementation("cpu", native.name(), native.is_active(), native.reason()))
    _define(native_op, native_op + schema[len(name) :], reference, fake)
    fast = getattr(torch.ops.hfquant, native_op).default

    def best(*arguments: Any) -> Any:
        return (fast if native.is_active() and supports(*arguments) else reference)(*arguments)

    _define(name, schema, best, fake)


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a backward formula to ``hfquant::<name>``."""
    torch.library.register_autograd(f"hfquant::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def implementations() -> dict[str, list[Implementation]]:
    """What can compute each op on this machine, the best first."""
    return {name: [entry() for entry in entries] for name, entries in sorted(OPS.items())}

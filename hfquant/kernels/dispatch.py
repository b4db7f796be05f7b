"""Defines the ops of the ``hfquant`` library, and says which implementation of each runs, and why.

Every op has a reference in plain torch. Faster implementations are listed for a kind of device; the first that neither
the device nor the arguments speak against runs, else the reference, after one warning that gives the reason.
``HFQUANT_KERNELS=reference`` runs the reference everywhere, without a warning.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native


_LIBRARY = torch.library.Library("hfquant", "DEF")

SWITCH = "HFQUANT_KERNELS"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: What users read: ``triton``, ``avx512``.
        load: Returns the function, which takes the arguments of the op; called when it first runs.
        unavailable: Why it cannot run on a device, or ``None``.
        refuses: Why it cannot take these arguments, or ``None``.
        quiet: Whether the reference computes what this one does not, without a warning.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[..., str | None]
    quiet: bool = False


@dataclass(frozen=True)
class Choice:
    """What an op runs on one kind of device: the implementation and, where it is not the fastest, the reason."""

    op: str
    device: str
    implementation: str
    reason: str


_REFERENCES: dict[str, Callable[..., Any]] = {}
_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {}
_IMPLEMENTATIONS: dict[tuple[str, str], list[Implementation]] = {}


def define_op(
    schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], entry: Callable[..., Any] | None = None
) -> None:
    """Define ``hfquant::<schema>`` with its plain torch implementation for every device.

    Args:
        schema: Name, arguments and results, as in ``"scale_rows(Tensor x, Tensor scale) -> Tensor"``.
        reference: The implementation used where no faster one is registered.
        fake: Same arguments; returns empty tensors of the right shape, dtype and device, for tracing.
        entry: Called in place of the chosen implementation, to check arguments first; it calls ``run``.
    """
    name = schema.partition("(")[0]
    _REFERENCES[name], _SCHEMAS[name] = reference, (schema, fake)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, entry or functools.partial(run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a backward formula to ``hfquant::<name>``."""
    torch.library.register_autograd(f"hfquant::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def register_implementation(op: str, device: str, implementation: Implementation) -> None:
    """Let ``implementation`` compute ``op`` on devices of type ``device``, after those that are registered already."""
    _IMPLEMENTATIONS.setdefault((op, device), []).append(implementation)


def register_native(op: str, supports: Callable[..., bool]) -> None:
    """Let the native library compute ``op`` on the CPU, as the op ``<op>_cpu`` with the same arguments.

    Args:
        op: Name of the op.
        supports: Same arguments as the op; whether the native kernel takes them.
    """
    name, (schema, fake) = f"{op}_cpu", _SCHEMAS[op]
    _LIBRARY.define(name + schema[len(op) :], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _REFERENCES[op], "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{name}", fake, lib=_LIBRARY)
    function = getattr(torch.ops.hfquant, name).default
    register_implementation(
        op,
        "cpu",
        Implementation(
            "native",
            lambda: function,
            lambda device: None if native.is_active() else native.reason(),
            lambda *arguments: None if supports(*arguments) else "the native kernel does not take these arguments",
            quiet=True,
        ),
    )


def register_triton(op: str, refuses: Callable[..., str | None] | None = None, *, quiet: bool = False) -> None:
    """Let ``<op>_triton`` in ``hfquant/kernels/<op>/triton.py`` compute ``op`` on CUDA devices.

    Args:
        op: Name of the op and of its folder.
        refuses: Why the kernel cannot take these arguments of the op, or ``None``.
        quiet: Whether the reference computes what the kernel does not, without a warning.
    """

    @functools.cache
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"hfquant.kernels.{op.removesuffix('_backward')}.triton"), f"{op}_triton"
        )
        return function

    register_implementation(
        op, "cuda", Implementation("triton", load, triton_unavailable, refuses or (lambda *_: None), quiet=quiet)
    )


@functools.cache
def triton_unavailable(device: torch.device) -> str | None:
    """Why no Triton kernel can run on the CUDA ``device``, or ``None``; builds and runs a tiny one to find out."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or newer, this one has {capability[0]}.{capability[1]}"
    try:
        grid = importlib.import_module("hfquant.kernels.grid.triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}; pip install triton"
    reason: str | None = grid.probe(device)
    return reason


NOT_AS_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def run(name: str, *arguments: Any) -> Any:
    """Compute ``hfquant::<name>`` with the best implementation for these arguments.

    Results are no views for autograd, whatever reshapes them: else a model could not change them in place.
    """
    with torch._C._ExcludeDispatchKeyGuard(NOT_AS_VIEWS):
        return _run(name, *arguments)


def _run(name: str, *arguments: Any) -> Any:
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    for implementation in _IMPLEMENTATIONS.get((name, device.type), ()):
        if reference_is_forced():
            break
        reason = implementation.unavailable(device) or implementation.refuses(*arguments)
        if reason is None:
            return implementation.load()(*arguments)
        if not implementation.quiet:
            _warn(name, implementation.name, device.type, reason)
    return _REFERENCES[name](*arguments)


def reference_is_forced() -> bool:
    """Whether the user asked for plain torch everywhere."""
    return os.environ.get(SWITCH) == "reference"


@functools.cache
def _warn(op: str, implementation: str, device: str, reason: str) -> None:
    warnings.warn(
        f"hfquant::{op} does not run its {implementation} kernel on {device}: {reason}", RuntimeWarning, stacklevel=2
    )


def choices() -> Iterator[Choice]:
    """What every op runs on the CPU and on CUDA devices of this machine, for arguments that are not special."""
    for op in sorted(_REFERENCES):
        for kind in ("cpu", "cuda"):
            device = torch.device(
                kind, torch.cuda.current_device() if kind == "cuda" and torch.cuda.is_available() else 0
            )
            yield _choose(op, device if kind == "cuda" else torch.device("cpu"))


def _choose(op: str, device: torch.device) -> Choice:
    listed = _IMPLEMENTATIONS.get((op, device.type), [])
    if reference_is_forced():
        return Choice(op, device.type, "reference", f"{SWITCH}=reference")
    reasons: list[str] = []
    for implementation in listed:
        reason = implementation.unavailable(device)
        if reason is None:
            return Choice(op, device.type, implementation.name, "; ".join(reasons))
        reasons.append(f"{implementation.name}: {reason}")
    return Choice(op, device.type, "reference", "; ".join(reasons) or "the only implementation")

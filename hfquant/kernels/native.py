"""The native CPU kernels: one shared library with a table of functions for each instruction set.

``HFQUANT_KERNELS`` forces an instruction set (``avx512bf16``, ``avx512``, ``avxvnni``, ``avx2``, ``scalar``) or
``reference``, plain torch. Without a built library everything runs in plain torch, after one warning.
"""

import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hfquant.errors import KernelError


FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Dtypes of activations that the native kernels take."""

MAX_IN_FEATURES = 1 << 16
"""Longest row whose sum of products stays within int32."""

_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}

_library: ctypes.CDLL | None = None
_active: str | None = None
_reason = ""
_warned = False


def is_active() -> bool:
    """Whether native kernels run in this process."""
    return _active is not None


def name() -> str:
    """Name of the instruction set in use, or ``native`` where none is."""
    return _active or "native"


def reason() -> str:
    """Why the native kernels run, or why not, in one sentence."""
    return _reason


def instruction_sets() -> dict[str, bool]:
    """Instruction sets of the built library, the best first, and whether this machine has them."""
    if _library is None:
        return {}
    names: list[bytes] = []
    while (isa := _library.hfquant_isa(len(names))) is not None:
        names.append(isa)
    return {isa.decode(): bool(_library.hfquant_has(isa)) for isa in names}


def select(choice: str) -> None:
    """Run the ops on the instruction set ``choice``, on the best one (``auto``), or in plain torch (``reference``).

    Raises:
        KernelError: If there is no such choice, or this machine or build does not have it.
    """
    global _active, _reason
    found = instruction_sets()
    available = [isa for isa, usable in found.items() if usable]
    if choice == "reference":
        _active, _reason = None, "switched off: reference is chosen"
        return
    if choice == "auto" and not available:
        _active = None  # the reason is known since loading
        return
    wanted = available[0] if choice == "auto" else choice
    if wanted not in available or _library is None:
        raise KernelError(
            f"HFQUANT_KERNELS={choice}: this machine and build have {', '.join(available) or 'no native kernels'}; "
            f"choose one of these, auto or reference"
        )
    _library.hfquant_select(wanted.encode())
    _active = wanted
    _reason = "the best this machine has" if wanted == available[0] else f"chosen in place of {available[0]}"


@contextmanager
def selected(choice: str) -> Iterator[None]:
    """``select(choice)`` for the length of a ``with`` block."""
    before = _active or "reference"
    select(choice)
    try:
        yield
    finally:
        select(before)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def float32_precision() -> int:
    """How exact float32 activations of weight-only layers are: ``torch.set_float32_matmul_precision`` says it.

    Returns:
        0 for "highest", with the error of float32; 1 for "high", 16 bits of the largest value of a group; 2 for
        "medium", bfloat16 where the processor multiplies it and there are many rows, else as 1.
    """
    try:
        return _PRECISIONS[torch._C._get_float32_matmul_precision()]
    except RuntimeError:  # set by ``torch.backends...fp32_precision``, as the Trainer's tf32 is: torch refuses to tell
        return 0


def _library_file() -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob("_cpu*.so"))), None)


def _torch_library() -> Path:
    suffix = ".dylib" if platform.system() == "Darwin" else ".so"
    return Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"


def _open(file: Path) -> ctypes.CDLL:
    """Load the library and let it register its ops with torch.

    Raises:
        OSError: If it does not load, or this torch lacks a function it needs.
    """
    library = ctypes.CDLL(str(file))
    library.hfquant_register.restype = ctypes.c_char_p
    library.hfquant_register.argtypes = [ctypes.c_void_p]
    library.hfquant_isa.restype = ctypes.c_char_p
    missing = library.hfquant_register(ctypes.CDLL(str(_torch_library()))._handle)
    if missing is not None:
        raise OSError(f"torch {torch.__version__} lacks {missing.decode()}")
    return library


def load() -> None:
    """Load the library and choose the instruction set; called once, at import."""
    global _library, _reason
    choice = os.environ.get("HFQUANT_KERNELS", "auto")
    file = _library_file()
    if file is None:
        _reason = "not built: no C++17 compiler was found when hfquant was installed"
    elif choice != "reference":
        try:
            _library = _open(file)
        except (OSError, AttributeError) as error:
            _reason = f"not loadable: {error}"
    select(choice)


def warn_if_missing() -> None:
    """Say once that quantized layers run slowly, and why, where nobody asked for that."""
    global _warned
    if _library is None and not _warned and os.environ.get("HFQUANT_KERNELS", "auto") != "reference":
        _warned = True
        warnings.warn(
            f"hfquant: the native CPU kernels are {_reason}. Quantized layers run in plain torch, several times "
            "slower; install a C++17 compiler and reinstall hfquant (HFQUANT_KERNELS=reference silences this)",
            RuntimeWarning,
            stacklevel=2,
        )


load()

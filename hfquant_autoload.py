"""Lets Transformers find hfquant in programs that never import it.

``import torch`` calls ``register`` (entry point group ``torch.backends``). It imports nothing heavy and never fails: it
only watches for the import of Transformers' loading code, and then makes a checkpoint with ``quant_method: hfquant``
import hfquant before it is loaded. ``HFQUANT_AUTOLOAD=0`` switches it off.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


WATCHED = ("transformers.quantizers.auto", "transformers.modeling_utils")
"""Modules that hold ``get_hf_quantizer``: where it is defined and where it is used.

Either may be half imported when torch calls ``register`` (they import torch), so both are watched.
"""


def register() -> None:
    """Watch for Transformers; called by ``import torch``, so it must be quick and must not raise."""
    try:
        if os.environ.get("HFQUANT_AUTOLOAD", "1") == "0" or any(isinstance(f, _Finder) for f in sys.meta_path):
            return
        sys.meta_path.insert(0, _Finder())
    except Exception:  # an exception here would break `import torch` for everyone
        return


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules through the other finders, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if finder is not self and find is not None else None
            if spec is not None and spec.loader is not None:
                _patch_after_execution(spec.loader)
                return spec  # type: ignore[no-any-return]
        return None


def _patch_after_execution(loader: Any) -> None:
    execute = loader.exec_module

    @functools.wraps(execute)
    def exec_module(module: ModuleType) -> None:
        execute(module)
        original = getattr(module, "get_hf_quantizer", None)
        if original is not None and not hasattr(original, "imports_hfquant"):
            module.get_hf_quantizer = _importing_hfquant(original)  # type: ignore[attr-defined]

    loader.exec_module = exec_module


def _importing_hfquant(get_hf_quantizer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_hf_quantizer)
    def wrapper(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if any(_is_ours(found) for found in (getattr(config, "quantization_config", None), quantization_config)):
            importlib.import_module("hfquant")
        return get_hf_quantizer(config, quantization_config, *args, **kwargs)

    wrapper.imports_hfquant = True  # type: ignore[attr-defined]
    return wrapper


def _is_ours(quantization_config: Any) -> bool:
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method") == "hfquant"
    return getattr(quantization_config, "quant_method", None) == "hfquant"

"""Lets Transformers find hfquant in programs that never import it.

``import torch`` calls ``register`` (entry point group ``torch.backends``). It imports nothing heavy and never fails: it
only watches for the import of Transformers' loading code, and then makes a checkpoint with ``quant_method: hfquant``
import hfquant before it is loaded. ``HFQUANT_AUTOLOAD=0`` switches it off. ``after_import`` is how hfquant itself waits
for PEFT.
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

PEFT = "peft.utils.other"
"""Module of PEFT's ``prepare_model_for_kbit_training``, wrapped before other modules take the function from it."""

_ACTIONS: dict[str, list[Callable[[ModuleType], None]]] = {}
"""Module name -> what to do when it has been imported."""


def register() -> None:
    """Watch for Transformers and PEFT; called by ``import torch``, so it must be quick and must not raise."""
    try:
        if os.environ.get("HFQUANT_AUTOLOAD", "1") == "0":
            return
        for name in WATCHED:
            _watch(name, _import_hfquant_for_its_checkpoints)
        _watch(PEFT, prepare_packed_models)
    except Exception:  # an exception here would break `import torch` for everyone
        return


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action`` with the module ``name``: now if it is imported, else when it has been."""
    module = sys.modules.get(name)
    if module is None or getattr(module.__spec__, "_initializing", False):
        _watch(name, action)
    else:
        action(module)


def _watch(name: str, action: Callable[[ModuleType], None]) -> None:
    actions = _ACTIONS.setdefault(name, [])
    if action not in actions:
        actions.append(action)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules through the other finders, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ACTIONS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if finder is not self and find is not None else None
            if spec is not None and spec.loader is not None:
                _act_after_execution(spec.loader, _ACTIONS[fullname])
                return spec  # type: ignore[no-any-return]
        return None


def _act_after_execution(loader: Any, actions: list[Callable[[ModuleType], None]]) -> None:
    execute = loader.exec_module

    @functools.wraps(execute)
    def exec_module(module: ModuleType) -> None:
        execute(module)
        for action in actions:
            action(module)

    loader.exec_module = exec_module


def _import_hfquant_for_its_checkpoints(module: ModuleType) -> None:
    original = getattr(module, "get_hf_quantizer", None)
    if original is not None and not hasattr(original, "imports_hfquant"):
        module.get_hf_quantizer = _importing_hfquant(original)  # type: ignore[attr-defined]


def _importing_hfquant(get_hf_quantizer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_hf_quantizer)
    def wrapper(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if any(_is_ours(found) for found in (getattr(config, "quantization_config", None), quantization_config)):
            importlib.import_module("hfquant")
        return get_hf_quantizer(config, quantization_config, *args, **kwargs)

    wrapper.imports_hfquant = True  # type: ignore[attr-defined]
    return wrapper


def prepare_packed_models(module: ModuleType) -> None:
    """Let PEFT's ``prepare_model_for_kbit_training`` in ``module`` leave models of hfquant to ``hfquant.hf.peft``."""
    original = getattr(module, "prepare_model_for_kbit_training", None)
    if original is not None and not hasattr(original, "imports_hfquant"):
        module.prepare_model_for_kbit_training = _preparing_packed_models(original)  # type: ignore[attr-defined]


def _preparing_packed_models(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def wrapper(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(getattr(getattr(model, "config", None), "quantization_config", None)):
            return prepare(model, *args, **kwargs)
        return importlib.import_module("hfquant.hf.peft").prepare_packed_model(prepare, model, *args, **kwargs)

    wrapper.imports_hfquant = True  # type: ignore[attr-defined]
    return wrapper


def _is_ours(quantization_config: Any) -> bool:
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method") == "hfquant"
    return getattr(quantization_config, "quant_method", None) == "hfquant"

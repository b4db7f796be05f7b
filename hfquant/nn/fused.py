"""Fewer and larger operations between the packed layers of a model on a CPU: norms, gates, rotary embedding.

A token of a small model spends more time on those than on its weights. A module takes part if, tried on random values,
it computes the formula of an op of ours; names do not matter. Where the native kernels do not run (another device,
autocast, a compiler), the module computes what it did before.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hfquant.kernels import native
from hfquant.kernels.activated_linear import NATIVE as NATIVE_ACTIVATED
from hfquant.kernels.gated_mlp import NATIVE as NATIVE_MLP
from hfquant.kernels.gated_product import GATES, gated_product
from hfquant.kernels.gated_product.reference import gate_reference, gated_product_reference
from hfquant.kernels.layers import PRECISION, layout_of
from hfquant.kernels.linear_op import weight_fits_native
from hfquant.kernels.rms_norm import NATIVE as NATIVE_NORM, rms_norm
from hfquant.kernels.rms_norm.reference import rms_norm_reference
from hfquant.kernels.rotary import NATIVE as NATIVE_ROTARY, fits_native
from hfquant.kernels.rotary.reference import rotary_reference
from hfquant.nn.fake_quant_module import FakeQuantModule
from hfquant.nn.packed_module import LAYOUT, PackedModule
from hfquant.nn.quant_linear import QuantLinear
from hfquant.schemes import LayerScheme


SETTINGS = "_hfquant_fused"
"""Attribute of a fused module with what its op needs."""

ATTENDS = "_hfquant_attends"
"""Attribute of modules that have packed layers, or layers in training that will be: their attention may be ours."""

ROTARY = "apply_rotary_pos_emb"
"""Name that the modules of Transformers give their rotary embedding."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYER_TENSORS = ("weight", "weight_scale", "weight_zero_point", "input_scale", "bias")


FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of the random values that modules are tried on, whatever the defaults are."""


class Fused(nn.Module):
    """Base of the classes that take the place of a module's own, which is their second base."""

    float_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made at run time have no name to be found by.
        return _new_fused, (type(self).__bases__[0], self.float_class), self.__dict__


class FusedNorm(Fused):
    """A root mean square norm as one op."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalize ``x [..., K]``."""
        weight = self._parameters["weight"]
        if args or kwargs or weight is None or not runs(x):
            return self.float_class.forward(self, x, *args, **kwargs)
        settings = self.__dict__[SETTINGS]
        if not torch.is_grad_enabled():
            try:
                return NATIVE_NORM(x, weight, *settings)
            except RuntimeError:  # what the kernel does not take
                pass
        if weight.dtype != x.dtype or not weight.is_contiguous():
            return self.float_class.forward(self, x)
        eps, unit_offset, round_first = settings
        return rms_norm(x, weight, eps, unit_offset=unit_offset, round_first=round_first)


class FusedGatedMLP(Fused):
    """``down_proj(act(gate_proj(x)) * up_proj(x))`` with one op between the layers."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer to ``x [..., K]``."""
        if args or kwargs or not runs(x, traced=True):
            return self.float_class.forward(self, x, *args, **kwargs)
        layers: Any = tuple(map(self._modules.get, PROJECTIONS))
        kind, packed = self.__dict__[SETTINGS], packed_arguments(layers)
        if packed is not None and x.size(-1) == layers[0].in_features:
            try:
                return NATIVE_MLP(x, *packed, kind)
            except RuntimeError:  # layouts that the kernels do not take
                pass
        if torch.compiler.is_compiling():
            return self.float_class.forward(self, x)
        gate, up, down = layers
        return down(gated_product(gate(x), up(x), kind))


class FusedActivation(Fused):
    """A linear layer with the activation behind it as one op, and perhaps another layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer to ``x [..., K]``."""
        if args or kwargs or not runs(x, traced=True):
            return self.float_class.forward(self, x, *args, **kwargs)
        kind, *names = self.__dict__[SETTINGS]
        layer, *others = (self._modules[name] for name in names)
        out = self._activated(x, layer, kind)
        if out is None:
            return self.float_class.forward(self, x)
        return others[0](out) if others else out  # type: ignore[misc]

    @staticmethod
    def _activated(x: Tensor, layer: Any, kind: int) -> Tensor | None:
        packed = packed_arguments((layer,))
        if packed is not None and x.size(-1) == layer.in_features:
            try:
                out: Tensor = NATIVE_ACTIVATED(x, *packed, kind)
                return out
            except RuntimeError:  # layouts that the kernels do not take
                pass
        return None if torch.compiler.is_compiling() else gated_product(layer(x), None, kind)


def packed_arguments(layers: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The tensors of packed layers and their layouts; ``None`` if calling them does more than apply them."""
    if torch.is_grad_enabled() or _has_any_global_hook():
        return None
    tensors: list[Tensor | None] = []
    layouts = native.float32_precision() * PRECISION
    for index, layer in enumerate(layers):
        if (
            type(layer) is not QuantLinear
            or layer.input_observer is not None
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or "forward" in layer.__dict__
            or "bias" not in layer._parameters  # so where it is parametrized
            or (torch.compiler.is_compiling() and not _fits_native(layer))  # a compiled op cannot be tried
        ):
            return None
        tensors += map(layer._parameters.get, LAYER_TENSORS)
        layouts |= _layout(layer) << 8 * index
    return *tensors, layouts


def _layout(layer: QuantLinear) -> int:
    known: tuple[LayerScheme, int] | None = layer.__dict__.get(LAYOUT)
    if known is None or known[0] is not layer.scheme:
        activation = layer.scheme.activation
        dynamic = activation is not None and activation.dynamic
        asymmetric = activation is not None and not activation.symmetric
        known = layer.scheme, layout_of(layer.scheme.weight.bits, dynamic=dynamic, asymmetric=asymmetric)
        if not torch.compiler.is_compiling():
            layer.__dict__[LAYOUT] = known
    return known[1]


def _fits_native(layer: QuantLinear) -> bool:
    weight, scale, zero_point, _, bias = map(layer._parameters.get, LAYER_TENSORS)
    bits = layer.scheme.weight.bits
    return weight_fits_native(weight, scale, zero_point, bias, layer.in_features, bits)  # type: ignore[arg-type]


def fuse_modules_(model: nn.Module) -> None:
    """Let norms, gates and rotary embeddings of ``model`` run as one op each; ``unfuse_modules_`` undoes it."""
    if not native.is_active():
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if any(isinstance(child, PackedModule | FakeQuantModule) for child in module.children()):
                module.__dict__[ATTENDS] = True
            if isinstance(module, Fused):
                continue
            for settings_of, kind in FORMULAS:
                settings = settings_of(module)
                if settings is not None:
                    module.__dict__[SETTINGS] = settings
                    set_class(module, fused_class(kind, type(module)))
                    break
            _fuse_rotary(type(module))


def unfuse_modules_(model: nn.Module) -> None:
    """Give every fused module of ``model`` its own class back."""
    for module in model.modules():
        module.__dict__.pop(ATTENDS, None)
        if isinstance(module, Fused):
            del module.__dict__[SETTINGS]
            set_class(module, module.float_class)


def set_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Another class for ``module``; hooks of Accelerate, which keep the forward they found, call the new one."""
    kept = module.__dict__.get("_old_forward")
    if getattr(kept, "__func__", None) is type(module).forward:
        module.__dict__["_old_forward"] = MethodType(new.forward, module)
    module.__class__ = new


_CLASSES: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def fused_class(kind: type[Fused], float_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``kind`` and ``float_class``, made once."""
    if (kind, float_class) not in _CLASSES:
        names = {"float_class": float_class, "__module__": float_class.__module__, "__doc__": float_class.__doc__}
        _CLASSES[kind, float_class] = type(float_class.__name__, (kind, float_class), names)
    return _CLASSES[kind, float_class]


def _new_fused(kind: type[Fused], float_class: type[nn.Module]) -> nn.Module:
    return object.__new__(fused_class(kind, float_class))


def runs(x: Tensor, *, traced: bool = False) -> bool:
    """Whether the native kernels may stand in for operations on ``x``; with ``traced``, in compiled models too."""
    return (
        isinstance(x, Tensor)
        and native.is_active()
        and x.is_cpu
        and x.dtype in native.FLOATS
        and not (torch.compiler.is_exporting() if traced else torch.compiler.is_compiling())
        and not torch.is_autocast_enabled("cpu")
    )


def stand_in(module: nn.Module, parameters: dict[str, Tensor], modules: Mapping[str, nn.Module]) -> nn.Module:
    """``module`` with other parameters and children, without hooks: to try its forward on."""
    other = object.__new__(type(module))
    other.__dict__ = copy.copy(module.__dict__)
    other.__dict__.pop("forward", None)
    other._parameters = dict(parameters)  # type: ignore[arg-type]
    other._modules = {**module._modules, **modules}
    return other


def _try(module: nn.Module, x: Tensor) -> Tensor | None:
    """What ``module.forward`` makes of ``x``; ``None`` if it wants more, or if training makes a difference."""
    found = []
    for module.training in (True, False):
        try:
            with torch.no_grad():
                found.append(module.forward(x))
        except Exception:  # whatever it needs that is not there, it is not what we look for
            return None
    first, second = found
    known = isinstance(first, Tensor) and first.shape == x.shape and first.dtype == x.dtype
    return first if known and torch.equal(first, second) else None


def _norm_settings(module: nn.Module) -> tuple[float, bool, bool] | None:
    """``(eps, unit_offset, round_first)`` if ``module`` is a root mean square norm of the last dimension."""
    weight, eps = module._parameters.get("weight"), module.__dict__.get("variance_epsilon", module.__dict__.get("eps"))
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if not isinstance(eps, float) or not alone or weight is None or weight.dim() != 1:
        return None
    factors = torch.rand(len(weight), **FLOAT) + 0.5
    x = torch.randn(4, len(weight), **FLOAT) * torch.tensor([[1e-3], [1.0], [30.0], [1e-2]], **FLOAT)
    found = _try(stand_in(module, {"weight": factors}, {}), x)
    for unit_offset in (False, True):
        if found is not None and close(found, rms_norm_reference(x, factors, eps, unit_offset, True)):
            round_first = _rounds_first(module, eps, unit_offset, factors, x)
            return None if round_first is None else (eps, unit_offset, round_first)
    return None


def _rounds_first(module: nn.Module, eps: float, unit_offset: bool, factors: Tensor, x: Tensor) -> bool | None:
    """Whether ``module`` rounds to bfloat16 before it multiplies by its weight; ``None`` if it does neither."""
    factors, x = factors.bfloat16(), x.bfloat16()
    found = _try(stand_in(module, {"weight": factors}, {}), x)
    for round_first in (True, False):
        expected = rms_norm_reference(x, factors, eps, unit_offset, round_first)
        if found is not None and (found != expected).float().mean() < 0.01:
            return round_first
    return None


def _gated_settings(module: nn.Module) -> int | None:
    """Index into ``GATES`` if ``module`` is ``down(act(gate(x)) * up(x))``."""
    if module._parameters or not all(module._modules.get(name) is not None for name in PROJECTIONS):
        return None
    size, inner = 6, 10
    shapes = ((size, inner), (size, inner), (inner, size))
    layers = {name: nn.Linear(*shape, **FLOAT) for name, shape in zip(PROJECTIONS, shapes, strict=True)}
    x = torch.randn(5, size, **FLOAT) * 3
    found = _try(stand_in(module, {}, layers), x)
    gate, up, down = layers.values()
    with torch.no_grad():
        for kind in range(len(GATES)):
            if found is not None and close(found, down(gated_product_reference(gate(x), up(x), kind))):
                return kind
    return None


def _activated_settings(module: nn.Module) -> tuple[Any, ...] | None:
    """Index into ``GATES`` and names of layers if ``module`` is ``act(layer(x))``, or ``other(act(layer(x)))``."""
    names = [name for name, child in module._modules.items() if isinstance(child, PackedModule | FakeQuantModule)]
    linear = all(isinstance(module._modules[name], nn.Linear) for name in names)
    if module._parameters or len(names) not in (1, 2) or not linear:
        return None
    layers, x = [nn.Linear(8, 8, **FLOAT) for _ in names], torch.randn(9, 8, **FLOAT) * 4
    found = _try(stand_in(module, {}, dict(zip(names, layers, strict=True))), x)
    with torch.no_grad():
        for kind in range(len(GATES)):
            expected = gate_reference(layers[0](x), kind)
            if found is not None and close(found, layers[1](expected) if layers[1:] else expected):
                return kind, *names
    return None


FORMULAS: tuple[tuple[Callable[[nn.Module], Any], type[Fused]], ...] = (
    (_norm_settings, FusedNorm),
    (_gated_settings, FusedGatedMLP),
    (_activated_settings, FusedActivation),
)
"""What a module needs to compute a formula, or ``None``; and the class that it gets then."""


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether float32 results are the same but for rounding."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def _fuse_rotary(module_class: type[nn.Module]) -> None:
    """Let the rotary embedding that the class calls run as one op where that gives the very same bits."""
    names = getattr(inspect.unwrap(module_class.forward), "__globals__", {})
    function = names.get(ROTARY)
    if isinstance(function, FunctionType) and not hasattr(function, SETTINGS) and _is_rotary(function):
        names[ROTARY] = _with_rotary_op(function)


@functools.cache
def _is_rotary(function: Callable[..., Any]) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, cos, sin = (torch.randn(2, n, 5, 16, **FLOAT).to(dtype) for n in (3, 1, 1, 1))
        cos, sin = cos.squeeze(1), sin.squeeze(1)
        try:
            found = function(q, k, cos, sin)
        except Exception:  # it takes other arguments
            return False
        expected = rotary_reference(q, k, cos, sin)
        if not isinstance(found, tuple) or len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            return False
    return True


def _with_rotary_op(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if args or kwargs or torch.compiler.is_compiling() or trains or not fits_native(q, k, cos, sin):
            return function(q, k, cos, sin, *args, **kwargs)
        return NATIVE_ROTARY(q, k, cos, sin)

    setattr(turned, SETTINGS, True)
    return turned

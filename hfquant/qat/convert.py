"""A trained model to its packed form: the codes and scales of its last state, and nothing derived again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from hfquant.errors import ConfigError
from hfquant.nn.fake_quant_module import FakeQuantModule
from hfquant.nn.select import packed_class
from hfquant.nn.swap import tie_packed_
from hfquant.numerics.affine import scale_to_bits
from hfquant.qat.prepare import check_finite, fake_quant_modules


def convert_modules_(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Swap every module that trained for a grid for the packed module it computed as, in place.

    Raises:
        ConfigError: If the model still computes with a blend of float and quantized values.
        SchemeError: If a trained parameter is NaN or infinite.
    """
    check_blend(model)
    check_finite(model)
    for _, module in list(fake_quant_modules(model)):
        convert_module_(module)
    tie_packed_(model, ties)


def check_blend(model: nn.Module) -> None:
    """Refuse a model that is not fully quantized yet.

    Raises:
        ConfigError: If the blend of a module is below 1.
    """
    for name, module in fake_quant_modules(model):
        if module.blend < 1:
            raise ConfigError(
                f"{name} computes with {100 * module.blend:.0f} % quantization: what would be saved is not what was "
                "trained. Train on until the blend is 1, or lower qat_blend_steps"
            )


def convert_module_(module: FakeQuantModule) -> None:
    """Swap one module for its packed form."""
    packed = {key: module.packed(key) for key in module.float_weights}
    residuals = {key: module.residual(key) for key in module.float_weights} if module.scheme.residual else {}
    input_scales = {key: module.input_scale(key) for key in module.float_weights}
    scheme, dtype = module.scheme, module.compute_dtype
    module.restore_()
    target = packed_class(module)
    assert target is not None
    target.swap_(module, scheme)
    converted: nn.Module = module
    assert isinstance(converted, target)
    converted.compute_dtype = dtype
    for key, value in packed.items():
        converted.load_packed(value, key)
        input_scale = input_scales[key]
        if input_scale is not None:
            converted.set_input_scale(scale_to_bits(input_scale), key)
    for key, residual in residuals.items():
        converted.set_residual(residual, key)


@contextmanager
def converted(model: nn.Module, ties: Mapping[str, str]) -> Iterator[None]:
    """Within: ``model`` is packed; afterwards it trains on from exactly the state it had."""
    states = [(m, type(m), dict(m.__dict__)) for _, m in fake_quant_modules(model)]
    with torch.no_grad():
        convert_modules_(model, ties)
    try:
        yield
    finally:
        for module, kind, state in states:
            module.__dict__.clear()
            module.__dict__.update(state)
            module.__class__ = kind

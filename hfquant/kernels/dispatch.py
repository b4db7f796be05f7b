"""Defines the ops of the ``hfquant`` library; torch's dispatcher then picks the implementation by device."""

from collections.abc import Callable
from typing import Any

import torch


_LIBRARY = torch.library.Library("hfquant", "DEF")


def define_op(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``hfquant::<schema>`` with its plain torch implementation for every device.

    Args:
        schema: Name, arguments and results, as in ``"scale_rows(Tensor x, Tensor scale) -> Tensor"``.
        reference: The implementation used where no faster one is registered.
        fake: Same arguments; returns empty tensors of the right shape, dtype and device, for tracing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a backward formula to ``hfquant::<name>``."""
    torch.library.register_autograd(f"hfquant::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

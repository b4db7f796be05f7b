"""Calibrated rounding of a model in fine-tuning: where its adapters have moved the weights goes onto the grid anew.

As in ``calibrated``, block by block. The layers of one block at a time are float modules, with the weights before the
rounding; afterwards they are what they were, with other codes, scales and residuals in the same parameters.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.nn.adapted_module import AdaptedModule
from hfquant.nn.packed_module import PackedModule, companion_name
from hfquant.nn.select import Selection
from hfquant.ptq.calibrated import Calibration, CalibrationOptions


class Recalibration(Calibration):
    """A calibrated run over the adapted layers of a model in fine-tuning, whose rounding is off until it ends.

    Their schemes stay, activations and all: training counts on them. So there is neither SmoothQuant, which would
    change norms that may train, nor a fallback for activations.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, AdaptedModule], batches: Sequence[Any], options: CalibrationOptions
    ) -> None:
        schemes = {name: module.scheme for name, module in layers.items()}
        super().__init__(model, Selection(schemes), batches, replace(options, smoothquant=False))
        self.layers = layers

    @torch.no_grad()
    def run_(self) -> None:
        """Round all layers anew, in place; a layer that is not reached yet computes as the float one would."""
        trains = [p for p in self.model.parameters() if p.requires_grad]
        for module in self.layers.values():
            module.rounded, module.input_observer = False, _no_quantized_input
        for parameter in trains:  # learned rounding must leave no gradients in them
            parameter.requires_grad_(False)
        try:
            super().run_()
        finally:
            for parameter in trains:
                parameter.requires_grad_(True)
            for module in self.layers.values():
                module.__dict__.pop("input_observer", None)

    def static_sizes(self) -> dict[str, int]:
        """None: no layer takes other activations than it has."""
        return {}

    def quantize_data_free_(self, part: Selection) -> None:
        """Quantize what needs no data, one layer at a time."""
        for name in part.schemes:
            with self._float([name]):
                super().quantize_data_free_(Selection({name: self.selection.schemes[name]}))

    def quantize_layers_(
        self,
        layers: Sequence[str],
        runs: Sequence[Callable[[], Any]],
        masks: Sequence[Tensor | None],
        targets: Sequence[Tensor] | None,
        block: nn.Module | None,
    ) -> None:
        """Quantize ``layers`` as float ones."""
        with self._float(layers):
            super().quantize_layers_(layers, runs, masks, targets, block)

    @contextmanager
    def _float(self, names: Collection[str]) -> Iterator[None]:
        """Float modules in place of adapted ones, which take what has become of those in the end, if all goes well."""
        schemes, before = self.selection.schemes, {}
        packed: dict[str, dict[str, Tensor]] = {}
        try:
            for name in names:
                module = self.layers[name]
                module.__dict__.pop("input_observer", None)
                before[name] = type(module), dict(module.__dict__)
                # Activations are not its business, and training starts from the residual, whether it is saved or not.
                schemes[name] = replace(module.scheme, activation=None, residual=True)
                module.unround_()
            yield
            packed = {name: _packed(self.layers[name]) for name in names}
        finally:
            for name, (kind, attributes) in before.items():
                module = self.layers[name]
                sqnr_db = module.__dict__.get("sqnr_db", {})
                module.__class__ = kind
                module.__dict__.clear()
                module.__dict__.update(attributes)
                schemes[name] = module.scheme
                if name in packed:
                    module.sqnr_db = sqnr_db
                    module.start_anew_(packed[name])


def _packed(module: PackedModule) -> dict[str, Tensor]:
    """The packed parameters of ``module`` by name, residuals too."""
    found: dict[str, Tensor] = {}
    for name in module.float_weights:
        residual = module.beside(name, "residual")
        assert residual is not None
        found |= dict(module.packed_parameters(name)) | {companion_name(name, "residual"): residual}
    return found


def _no_quantized_input(name: str, x: Tensor) -> None:
    """Observes nothing; a layer that has an observer computes on activations that are not quantized."""

"""Calibrated quantization of a model in memory, block by block, on quantized inputs.

Each block is quantized on what the blocks before it, already quantized, really hand to it. Only the hidden states
between two blocks are kept, never the activations of more than one block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError
from hfquant.nn.packed_module import PackedModule
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.select import Selection, packed_class
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.observers import choose_input_scale
from hfquant.numerics.packing import PackedWeight
from hfquant.ptq.blocks import Call, find_stacks, is_chain, quiet_model, record_calls
from hfquant.ptq.calibrate import run_batch
from hfquant.ptq.quantize import quantize_modules_
from hfquant.ptq.quantize_matrix import CALIBRATED, MatrixResult, quantize_matrix
from hfquant.ptq.statistics import Collector, InputStatistics, WeightKey
from hfquant.schemes import LayerScheme


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        algorithm: What chooses scales and codes.
        iterations: Of learned rounding.
        observer: What chooses static activation ranges.
        smoothquant: Move outliers of activations into weights where INT8 activations are asked for.
        seed: Of learned rounding.
        progress: Show a progress bar.
    """

    algorithm: str = "gptq"
    iterations: int = 200
    observer: str = "minmax"
    smoothquant: bool = True
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True)
class LayerResult:
    """How one weight matrix was quantized, for the report.

    Attributes:
        name: Of the parameter; with ``[expert]`` behind it where there are several.
        scheme: As in ``int4-g64``.
        method: What its codes come from.
        sqnr_db: Of the weight.
        output_sqnr_db: Of the layer's output on held-out tokens.
        rows: Calibration rows that reached it.
        losses: Method -> squared error of its output on held-out rows.
        note: What a reader should know.
    """

    name: str
    scheme: str
    method: str
    sqnr_db: float
    output_sqnr_db: float | None
    rows: int
    losses: dict[str, float] = field(default_factory=dict)
    note: str = ""


def calibrate_(
    model: nn.Module, selection: Selection, batches: Sequence[Any], options: CalibrationOptions
) -> list[LayerResult]:
    """Quantize everything in ``selection`` in place, on what ``batches`` make each layer see.

    Args:
        model: Float model in memory.
        selection: What to quantize, and how.
        batches: What the model is called with.
        options: How to calibrate.

    Returns:
        How each weight was quantized.

    Raises:
        CalibrationError: If activations are not finite, or a static layer was never reached.
        SchemeError: If a weight holds NaN or infinity.
    """
    calibration = Calibration(model, selection, batches, options)
    calibration.run_()
    return calibration.results


class Calibration:
    """The state of one calibrated run over a model.

    Attributes:
        results: What was done so far, by layer.
    """

    def __init__(
        self, model: nn.Module, selection: Selection, batches: Sequence[Any], options: CalibrationOptions
    ) -> None:
        self.model, self.selection, self.batches, self.options = model, selection, batches, options
        self.masks = [_padding_mask(batch) for batch in batches]
        self.results: list[LayerResult] = []

    @torch.no_grad()
    def run_(self) -> None:
        """Quantize everything that is selected, in place."""
        selection, model = self.selection, self.model
        data_free = {name for name in selection.schemes if self._needs_no_data(name)}
        rest = [name for name in selection.schemes if name not in data_free]
        stacks = find_stacks(model, rest)
        inside = {name for stack in stacks for name in rest if _is_in(name, stack)}
        quantize_modules_(model, _part(selection, data_free), algorithm=self._data_free_algorithm(), progress=False)
        total = sum(len(stack) for stack in stacks)
        with tqdm(total=total, desc="Quantizing", unit="block", disable=not self.options.progress) as bar:
            for stack in stacks:
                for _ in self._quantize_stack_(stack, inside):
                    bar.update()
        self._quantize_rest_([name for name in rest if name not in inside])

    def _needs_no_data(self, name: str) -> bool:
        """Tables, and heads in 8 bits: a search on their inputs changes nothing."""
        scheme = self.selection.schemes[name]
        static = scheme.quantization_type == "static"
        is_table = packed_class(self.model.get_submodule(name)) is QuantEmbedding
        tied = name in self.selection.ties or name in self.selection.ties.values()
        return is_table or tied or (not static and self.options.algorithm not in CALIBRATED)

    def _data_free_algorithm(self) -> str:
        return "search" if self.options.algorithm in CALIBRATED else self.options.algorithm

    def _quantize_stack_(self, stack: list[str], inside: set[str]) -> Iterator[None]:
        """Quantize one stack; yields after each block."""
        chained = is_chain(self.model, stack, self.batches[0])
        calls = record_calls(self.model, stack, self.batches, pass_through=True) if chained else {}
        hidden: list[Tensor] = [call.hidden for call in calls[stack[0]]] if chained else []
        for name in stack:
            if chained:
                current = [call.with_hidden(h) for call, h in zip(calls.pop(name), hidden, strict=True)]
            else:
                current = record_calls(self.model, [name], self.batches, pass_through=False)[name]
            block = self.model.get_submodule(name)
            layers = [layer for layer in inside if layer.startswith(f"{name}.")]
            layers = [layer for layer in self.selection.schemes if layer in layers]  # in the model's order
            runs = [_runner(call, block) for call in current]
            masks = self.masks if len(runs) == len(self.masks) else [None] * len(runs)
            with quiet_model(block):
                self._quantize_layers_(layers, runs, masks)
                if chained:
                    hidden = [call.run(block) for call in current]
            yield

    def _quantize_rest_(self, layers: list[str]) -> None:
        """Layers outside of all stacks, on one pass of the whole model."""
        if layers:
            runs = [_model_runner(self.model, batch) for batch in self.batches]
            with quiet_model(self.model):
                self._quantize_layers_(layers, runs, self.masks)

    def _quantize_layers_(
        self, layers: Sequence[str], runs: Sequence[Callable[[], Any]], masks: Sequence[Tensor | None]
    ) -> None:
        modules = {name: self.model.get_submodule(name) for name in layers}
        collector = Collector(modules, len(runs))
        with collector.attached():
            for run, mask in zip(runs, masks, strict=True):
                collector.next_batch(mask)
                run()
        for name, module in modules.items():
            self._quantize_layer_(name, module, collector.found)

    def _quantize_layer_(self, name: str, module: nn.Module, found: Mapping[WeightKey, InputStatistics]) -> None:
        scheme = self.selection.schemes[name]
        target = packed_class(module)
        assert target is not None
        results: dict[str, list[MatrixResult]] = {}
        for key, weight in target.weights_of(module).items():
            rows = weight.to_rows(module.get_parameter(key))
            experts = range(rows.shape[0]) if rows.ndim == 3 else (None,)
            results[key] = [
                self._quantize_matrix(WeightKey(name, key, e), rows if e is None else rows[e], scheme, found)
                for e in experts
            ]
        target.swap_(module, scheme)
        assert isinstance(module, PackedModule)
        for key, parts in results.items():
            is_matrix = len(module.float_weights[key].shape) == 2
            module.load_packed(_stacked([part.packed() for part in parts], is_matrix=is_matrix), key)
            module.sqnr_db[key] = min(part.sqnr_db for part in parts)
            if scheme.quantization_type == "static":
                module.set_input_scale(self._input_scale(name, key, found), key)

    def _input_scale(self, name: str, key: str, found: Mapping[WeightKey, InputStatistics]) -> Tensor:
        """One static scale, shared by the experts of a layer, so that one without tokens has one too."""
        seen = [s for k, s in found.items() if (k.module, k.parameter) == (name, key) and s.rows + s.held_rows]
        if not seen:
            raise CalibrationError(
                f"no calibration batch reached {name} ({key}); add data that does, or put it in skip_modules"
            )
        absmax = torch.stack([s.absmax.amax() for s in seen]).amax()
        scale = choose_input_scale(torch.cat([s.sample for s in seen]), absmax, self.options.observer)
        return scale_to_bits(scale)

    def _quantize_matrix(
        self, key: WeightKey, rows: Tensor, scheme: LayerScheme, found: Mapping[WeightKey, InputStatistics]
    ) -> MatrixResult:
        statistics = found.get(key)
        result = quantize_matrix(rows, scheme.weight, statistics, algorithm=self.options.algorithm, name=str(key))
        seen = 0 if statistics is None else statistics.rows + statistics.held_rows
        self.results.append(
            LayerResult(
                str(key), str(scheme), result.method, result.sqnr_db, result.output_sqnr_db, seen, result.losses,
                result.note,
            )
        )  # fmt: skip
        return result


def _runner(call: Call, block: nn.Module) -> Callable[[], Tensor]:
    return lambda: call.run(block)


def _model_runner(model: nn.Module, batch: Any) -> Callable[[], None]:
    return lambda: run_batch(model, batch)


def _stacked(parts: list[PackedWeight], *, is_matrix: bool) -> PackedWeight:
    if is_matrix:
        return parts[0]
    zero = None if parts[0].weight_zero_point is None else torch.stack([p.weight_zero_point for p in parts])  # type: ignore[misc]
    return PackedWeight(torch.stack([p.weight for p in parts]), torch.stack([p.weight_scale for p in parts]), zero)


def _padding_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()) else None


def _is_in(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _part(selection: Selection, names: set[str]) -> Selection:
    schemes = {name: scheme for name, scheme in selection.schemes.items() if name in names}
    return Selection(schemes, {}, {name: owner for name, owner in selection.ties.items() if name in names})

"""Calibrated quantization of a model in memory, block by block, on quantized inputs.

Each block is quantized on what the blocks before it, already quantized, really hand to it. Only the hidden states
between two blocks are kept, never the activations of more than one block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError
from hfquant.nn.packed_module import PackedModule, companion_name
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.select import Selection, packed_class
from hfquant.numerics.affine import scale_to_bits
from hfquant.numerics.observers import choose_input_scale
from hfquant.numerics.residual import rounding_residual
from hfquant.ptq.awq import equalize_
from hfquant.ptq.blocks import Call, find_stacks, is_chain, quiet_model, record_calls
from hfquant.ptq.calibrate import run_batch
from hfquant.ptq.fallback import HARMLESS, Noise, block_noise, settle_scheme, worst_layers
from hfquant.ptq.layer_result import LayerResult, layer_result, stacked
from hfquant.ptq.quantize import quantize_modules_
from hfquant.ptq.quantize_matrix import CALIBRATED, MatrixResult, quantize_matrix
from hfquant.ptq.quantize_weight import check_finite
from hfquant.ptq.signround import Task, learn_rounding
from hfquant.ptq.smoothquant import find_folds, smooth_
from hfquant.ptq.statistics import Collector, InputStatistics, WeightKey
from hfquant.ptq.store import Store
from hfquant.schemes import ActivationScheme, LayerScheme


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


def calibrate_(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    options: CalibrationOptions,
    store: Store | None = None,
) -> list[LayerResult]:
    """Quantize everything in ``selection`` in place, on what ``batches`` make each layer see.

    Args:
        model: Float model in memory.
        selection: What to quantize, and how.
        batches: What the model is called with.
        options: How to calibrate.
        store: Keeps finished blocks, and has those of an interrupted run.

    Returns:
        How each weight was quantized.

    Raises:
        CalibrationError: If activations are not finite, or a static layer was never reached.
        SchemeError: If a weight holds NaN or infinity.
    """
    calibration = Calibration(model, selection, batches, options, store)
    calibration.run_()
    return calibration.results


class Calibration:
    """The state of one calibrated run over a model.

    Attributes:
        results: What was done so far, by layer.
        alphas: Layer -> share of the outliers of its inputs that SmoothQuant moved into its weights.
        noise: What static activations change in the blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        batches: Sequence[Any],
        options: CalibrationOptions,
        store: Store | None = None,
    ) -> None:
        self.model, self.selection, self.batches, self.options = model, selection, batches, options
        self.store = store
        self.masks = [_padding_mask(batch) for batch in batches]
        self.results: list[LayerResult] = []
        self.alphas: dict[str, float] = {}
        self.noise: list[Noise] = []

    @torch.no_grad()
    def run_(self) -> None:
        """Quantize everything that is selected, in place."""
        selection, model = self.selection, self.model
        sizes = self.static_sizes()
        data_free = {name for name in selection.schemes if self._needs_no_data(name)}
        rest = [name for name in selection.schemes if name not in data_free]
        stacks = find_stacks(model, rest)
        inside = {name for stack in stacks for name in rest if _is_in(name, stack)}
        heads = {name for name in rest if name not in inside and _is_plain_int8(selection.schemes[name])}
        data_free, rest = data_free | heads, [name for name in rest if name not in heads]
        self.quantize_data_free_(_part(selection, data_free))
        total = sum(len(stack) for stack in stacks)
        with tqdm(total=total, desc="Quantizing", unit="block", disable=not self.options.progress) as bar:
            for stack in stacks:
                for _ in self._quantize_stack_(stack, inside):
                    bar.update()
        self._quantize_rest_([name for name in rest if name not in inside])
        for name, noise in worst_layers(self.noise, sizes, selection.schemes).items():
            self._make_dynamic_(name, noise)

    def static_sizes(self) -> dict[str, int]:
        """Weights of each layer that is to have static activations."""
        sizes = {}
        for name, scheme in self.selection.schemes.items():
            module = self.model.get_submodule(name)
            target = packed_class(module)
            if scheme.quantization_type == "static" and target is not None:
                sizes[name] = sum(weight.numel for weight in target.weights_of(module).values())
        return sizes

    def _make_dynamic_(self, name: str, noise: Noise) -> None:
        """Change the activations of a packed layer; its codes stay."""
        module = self.model.get_submodule(name)
        assert isinstance(module, PackedModule)
        scheme = replace(module.scheme, activation=ActivationScheme(dynamic=True))
        percent = (f"{100 * value:.2g} %" for value in (noise.static, noise.dynamic))
        note = "activations: static ones change its block's output by {}, dynamic ones by {}".format(*percent)
        module.scheme = self.selection.schemes[name] = scheme
        for key in module.float_weights:
            del module._parameters[companion_name(key, "input_scale")]
        own = {f"{name}.{key}" for key in module.float_weights}
        self.results = [
            replace(r, scheme=str(scheme), note="; ".join(filter(None, (r.note, note)))) if r.name in own else r
            for r in self.results
        ]

    def _needs_no_data(self, name: str) -> bool:
        """Tables, what is tied to them, and everything if the algorithm looks at no inputs."""
        scheme = self.selection.schemes[name]
        static = scheme.quantization_type == "static"
        is_table = packed_class(self.model.get_submodule(name)) is QuantEmbedding
        tied = name in self.selection.ties or name in self.selection.ties.values()
        return is_table or tied or (not static and self.options.algorithm not in CALIBRATED)

    def quantize_data_free_(self, part: Selection) -> None:
        """Quantize what needs no data."""
        algorithm = "search" if self.options.algorithm in CALIBRATED else self.options.algorithm
        quantize_modules_(self.model, part, algorithm=algorithm, store=self.store, progress=False)

    def _quantize_stack_(self, stack: list[str], inside: set[str]) -> Iterator[None]:
        """Quantize one stack; yields after each block."""
        chained = is_chain(self.model, stack, self.batches[0])
        calls = record_calls(self.model, stack, self.batches, pass_through=True) if chained else {}
        hidden: list[Tensor] = [call.hidden for call in calls[stack[0]]] if chained else []
        learning = self.options.algorithm == "signround"
        exact = hidden  # the same hidden states in a model that is not quantized
        for name in stack:
            if chained:
                current = [call.with_hidden(h) for call, h in zip(calls[name], hidden, strict=True)]
            else:
                current = record_calls(self.model, [name], self.batches, pass_through=False)[name]
            block = self.model.get_submodule(name)
            layers = [layer for layer in self.selection.schemes if layer in inside and layer.startswith(f"{name}.")]
            runs = [_runner(call, block) for call in current]
            masks = self.masks if len(runs) == len(self.masks) else [None] * len(runs)
            with quiet_model(block):
                if learning:
                    ideal = current
                    if chained:
                        ideal = [call.with_hidden(h) for call, h in zip(calls[name], exact, strict=True)]
                    exact = [call.run(block) for call in ideal]
                if not self._restored_(name, block, layers):
                    self.quantize_layers_(layers, runs, masks, exact if learning else None, block)
                    self._keep(name, block, layers)
                if chained:
                    hidden = [call.run(block) for call in current]
                    del calls[name]
            yield

    def _restored_(self, name: str, block: nn.Module, layers: Sequence[str]) -> bool:
        """Whether the block was finished by an interrupted run, and is now as that run left it."""
        found = None if self.store is None else self.store.load(name)
        if found is None:
            return False
        tensors, record = found
        for layer in layers:
            module, target = self.model.get_submodule(layer), packed_class(self.model.get_submodule(layer))
            assert target is not None
            self.selection.schemes[layer] = LayerScheme.parse(record["schemes"][layer])
            target.swap_(module, self.selection.schemes[layer])
            assert isinstance(module, PackedModule)
            module.sqnr_db = record["sqnr_db"][layer]
        _set_parameters_(block, tensors)
        self.results += [LayerResult(**result) for result in record["results"]]
        self.noise += [Noise(tuple(entry.pop("layers")), **entry) for entry in record.get("noise", [])]
        return True

    def _keep(self, name: str, block: nn.Module, layers: Sequence[str]) -> None:
        if self.store is None:
            return
        modules = {layer: self.model.get_submodule(layer) for layer in layers}
        results = [r for r in self.results if any(r.name.startswith(f"{layer}.") for layer in layers)]
        record = {
            "schemes": {layer: str(self.selection.schemes[layer]) for layer in layers},
            "sqnr_db": {layer: module.sqnr_db for layer, module in modules.items()},
            "results": [asdict(result) for result in results],
            "noise": [asdict(entry) for entry in self.noise if entry.layers[0] in modules],
        }
        _set_parameters_(block, self.store.save(name, dict(block.named_parameters()), record))

    def _quantize_rest_(self, layers: list[str]) -> None:
        """Layers outside of all stacks, on one pass of the whole model."""
        if layers:
            runs = [_model_runner(self.model, batch) for batch in self.batches]
            with quiet_model(self.model):
                self.quantize_layers_(layers, runs, self.masks, None, None)

    def quantize_layers_(
        self,
        layers: Sequence[str],
        runs: Sequence[Callable[[], Any]],
        masks: Sequence[Tensor | None],
        targets: Sequence[Tensor] | None,
        block: nn.Module | None,
    ) -> None:
        """Quantize ``layers``, which ``runs`` make run; ``targets`` are what their block should return."""
        modules = {name: self.model.get_submodule(name) for name in layers}
        for name, module in modules.items():
            _check_weights(name, module)
        collector = Collector(modules, len(runs))
        with collector.attached():
            for run, mask in zip(runs, masks, strict=True):
                collector.next_batch(mask)
                run()
        self._smooth_(block, runs, modules, collector.found)
        if block is not None:
            self.noise += block_noise(
                runs, masks, modules, self.selection.schemes, collector.found, self.options.observer
            )
        results = {name: self._quantize_layer(name, module, collector.found) for name, module in modules.items()}
        if targets is not None:
            tasks = [Task(run, y, mask) for run, y, mask in zip(runs, targets, masks, strict=True)]
            self._learn_rounding(modules, results, tasks)
        for name, module in modules.items():
            self.pack_(name, module, results[name], collector.found)

    def _smooth_(
        self,
        block: nn.Module | None,
        runs: Sequence[Callable[[], Any]],
        modules: Mapping[str, nn.Module],
        found: Mapping[WeightKey, InputStatistics],
    ) -> None:
        """Move outliers of INT8 activations into the weights of one block, or equalise its weights, where exact."""
        linear = {n: m for n, m in modules.items() if WeightKey(n, "weight") in found}
        schemes, options = self.selection.schemes, self.options
        smooth = options.smoothquant and any(schemes[name].activation is not None for name in linear)
        if block is None or not (smooth or options.algorithm == "awq"):
            return
        folds = find_folds(block, runs[0], linear)
        if smooth:
            self.alphas |= smooth_(folds, linear, schemes, found, options.observer)
        if options.algorithm == "awq":
            self.alphas |= equalize_(folds, linear, schemes, found)

    def _learn_rounding(
        self, modules: Mapping[str, nn.Module], results: dict[str, dict[str, list[MatrixResult]]], tasks: list[Task]
    ) -> None:
        """Replace the results of linear layers that the data reached; fused experts keep theirs."""
        start = {n: parts["weight"][0] for n, parts in results.items() if list(parts) == ["weight"]}
        start = {name: result for name, result in start.items() if result.losses}
        if start and tasks:
            options = self.options
            made = learn_rounding(modules, start, tasks, iterations=options.iterations, seed=options.seed)
            results |= {name: {"weight": [result]} for name, result in made.items()}

    def _quantize_layer(
        self, name: str, module: nn.Module, found: Mapping[WeightKey, InputStatistics]
    ) -> dict[str, list[MatrixResult]]:
        """The codes of each parameter of one layer, for each expert."""
        target, scheme = packed_class(module), self.selection.schemes[name]
        assert target is not None
        results = {}
        for key, weight in target.weights_of(module).items():
            rows = weight.to_rows(module.get_parameter(key))
            parts = [(WeightKey(name, key), rows)]
            if rows.ndim == 3:
                parts = [(WeightKey(name, key, expert), rows[expert]) for expert in range(rows.shape[0])]
            algorithm = self.options.algorithm
            results[key] = [
                quantize_matrix(values, scheme.weight, found.get(k), algorithm=algorithm, name=str(k))
                for k, values in parts
            ]
        return results

    def pack_(
        self,
        name: str,
        module: nn.Module,
        results: Mapping[str, list[MatrixResult]],
        found: Mapping[WeightKey, InputStatistics],
    ) -> None:
        """Put the packed module in place of the float one, and write down how."""
        target, scheme = packed_class(module), self.selection.schemes[name]
        assert target is not None
        originals = {key: w.to_rows(module.get_parameter(key)) for key, w in target.weights_of(module).items()}
        note = ""
        if all(entry.static > HARMLESS for entry in self.noise if name in entry.layers):
            scheme, note = settle_scheme(scheme, originals, results, found, name, self.options.observer)
        if name in self.alphas:
            note = "; ".join(filter(None, (f"inputs rescaled, alpha {self.alphas[name]:.1f}", note)))
        self.selection.schemes[name] = scheme
        target.swap_(module, scheme)
        assert isinstance(module, PackedModule)
        for key, parts in results.items():
            rows = originals[key] if originals[key].ndim == 3 else originals[key].unsqueeze(0)
            for expert, (part, original) in enumerate(zip(parts, rows, strict=True)):
                weight = WeightKey(name, key, expert if len(parts) > 1 else None)
                noted = replace(part, note="; ".join(filter(None, (part.note, note))))
                self.results.append(layer_result(str(weight), scheme, noted, original, found.get(weight)))
            is_matrix = originals[key].ndim == 2
            module.load_packed(stacked([part.packed() for part in parts], is_matrix=is_matrix), key)
            module.sqnr_db[key] = min(result.sqnr_db for result in self.results[-len(parts) :])
            if scheme.residual:
                module.set_residual(rounding_residual(originals[key], module.packed(key), bits=scheme.weight.bits), key)
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


def _set_parameters_(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        owner, _, parameter = key.rpartition(".")
        module, old = block.get_submodule(owner), block.get_submodule(owner)._parameters[parameter]
        assert old is not None
        module._parameters[parameter] = nn.Parameter(tensor.to(old.device), requires_grad=old.requires_grad)


def _runner(call: Call, block: nn.Module) -> Callable[[], Tensor]:
    return lambda: call.run(block)


def _model_runner(model: nn.Module, batch: Any) -> Callable[[], None]:
    return lambda: run_batch(model, batch)


def _check_weights(name: str, module: nn.Module) -> None:
    target = packed_class(module)
    assert target is not None
    for key in target.weights_of(module):
        check_finite(module.get_parameter(key), f"{name}.{key}")


def _padding_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()) else None


def _is_plain_int8(scheme: LayerScheme) -> bool:
    """Such an output head loses nothing that calibration could save, and is the largest matrix of a model."""
    return scheme.weight.bits == 8 and scheme.activation is None


def _is_in(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _part(selection: Selection, names: set[str]) -> Selection:
    schemes = {name: scheme for name, scheme in selection.schemes.items() if name in names}
    return Selection(schemes, {}, {name: owner for name, owner in selection.ties.items() if name in names})

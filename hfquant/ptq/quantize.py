"""The loop over a model in memory: each selected weight to packed codes, in place."""

from torch import nn
from tqdm.auto import tqdm

from hfquant.nn.select import Selection, packed_class
from hfquant.nn.swap import swap_modules_
from hfquant.numerics.residual import rounding_residual
from hfquant.ptq.store import Store, quantize_and_keep


def quantize_modules_(
    model: nn.Module, selection: Selection, *, algorithm: str, store: Store | None = None, progress: bool = True
) -> None:
    """Quantize the selected modules of ``model`` in place, one weight at a time.

    Nothing is changed when a weight turns out to be unusable: all errors come before the first swap of that module.

    Args:
        model: Float model in memory.
        selection: What to quantize, and how.
        algorithm: What chooses the scales.
        store: Keeps finished weights, and has those of an interrupted run.
        progress: Show a progress bar.

    Raises:
        SchemeError: If a weight holds NaN or infinity.
    """
    owners = {name: scheme for name, scheme in selection.schemes.items() if name not in selection.ties}
    for name, scheme in tqdm(owners.items(), desc="Quantizing", unit="layer", disable=not progress):
        module = model.get_submodule(name)
        target = packed_class(module)
        assert target is not None
        rows = {key: weight.to_rows(module.get_parameter(key)) for key, weight in target.weights_of(module).items()}
        results = {
            key: quantize_and_keep(values, scheme.weight, algorithm=algorithm, name=f"{name}.{key}", store=store)
            for key, values in rows.items()
        }
        target.swap_(module, scheme)
        packed = model.get_submodule(name)
        assert isinstance(packed, target)
        for key, result in results.items():
            packed.load_packed(result.packed, key)
            packed.sqnr_db[key] = result.sqnr_db
            if scheme.residual:
                packed.set_residual(rounding_residual(rows[key], result.packed, bits=scheme.weight.bits), key)
        del rows
    tied = {name: selection.schemes[name] for name in selection.ties}
    swap_modules_(model, tied, selection.ties)

"""Sizes of tiles for the GPU kernels: what the launch code picks beside others, on one NVIDIA GPU.

    python benchmarks/gpu_tiles.py packed        # few rows of float activations on INT4 and INT8 weights
    python benchmarks/gpu_tiles.py integers      # INT8 activations on INT8 weights, 1 to 4096 rows
    python benchmarks/gpu_tiles.py elementwise   # dequantize, fake quantize, rows of activations

Tiles take the place of the launch code's own, so that each is timed as users would run it, between bfloat16 ``linear``
or a copy of the same run. Times are medians of replays of a CUDA graph, weights rotate through more memory than the L2
cache holds, as in ``gpu.py``; what a tile computes is ``gpu.py parity``'s business. Written to
benchmarks/results/gpu-tiles-<part>.json.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu import RESULTS, Row, attempt, float_time, machine, packed_time, random_packed, rotated
from torch import Tensor

from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.fake_quantize import fake_quantize
from hfquant.kernels.quantize_rows import quantize_rows
from hfquant.numerics.affine import round_scale, scale_to_bits


SHAPES = [(1024, 4096), (2048, 2048), (4096, 4096), (14336, 4096), (8192, 8192)]
Tile = dict[str, Any]


def modules() -> dict[str, Any]:
    """The Triton modules; only where there is Triton."""
    import hfquant.kernels.dequantize.triton as dequantize
    import hfquant.kernels.fake_quantize.triton as fake
    import hfquant.kernels.int8_linear.triton as int8
    import hfquant.kernels.packed_matmul.triton as packed
    import hfquant.kernels.quantize_rows.triton as rows

    return {"dequantize": dequantize, "fake_quantize": fake, "int8": int8, "packed": packed, "quantize_rows": rows}


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """``module`` with other constants or functions."""
    kept = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def packed(shapes: list[tuple[int, int]]) -> Iterator[Row]:
    module = modules()["packed"]
    for (n, k), (bits, group), m in itertools.product(shapes, ((4, 128), (4, 32), (8, None)), (1, 16, 64)):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        case = {"N": n, "K": k, "M": m, "bits": bits, "group": group}
        own = module.choose_tile(n, m, k, group or 0, bits, x.device)
        yield timed(case | {"tile": "linear in bf16"}, lambda: float_time(n, k, x))
        yield timed(case | {"tile": "ours"} | own, lambda: packed_time(n, k, x, bits, group))
        rows = (8,) if m == 1 else (16,) if m == 16 else (16, 32, 64)
        for bn, bm, bk, stages in itertools.product((16, 32, 64, 128), rows, (64, 128, 256), (2, 3, 4, 6)):
            tile = own | {"BN": bn, "BM": bm, "BK": bk, "STAGES": stages, "EVEN": k % (own["S"] * bk) == 0}
            with replaced(module, choose_tile=lambda *_, tile=tile, **__: tile):
                yield timed(case | {"tile": "other"} | tile, lambda: packed_time(n, k, x, bits, group))


def integers(shapes: list[tuple[int, int]]) -> Iterator[Row]:
    module, scale = modules()["int8"], scale_to_bits(torch.tensor([0.03], device="cuda"))
    for (n, k), m, asymmetric in itertools.product(shapes, (1, 16, 64, 128, 512, 1024, 4096), (False, True)):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        arguments = {"dynamic": True, "asymmetric": True} if asymmetric else {"input_scale": scale}
        case = {"N": n, "K": k, "M": m, "asymmetric": asymmetric}
        measure = lambda: packed_time(n, k, x, 8, None, **arguments)
        kernel, own, warps = module.choose_kernel(n, m, k, x.device, asymmetric=asymmetric)
        yield timed(case | {"tile": "linear in bf16"}, lambda: float_time(n, k, x))
        yield timed(case | {"tile": "ours", "warps": warps} | own, measure)
        few, many = module.int8_few_rows_kernel, module.int8_many_rows_kernel
        options = [(few, bn, bm, bk, 4) for bn, bm, bk in itertools.product((16, 32, 64), (8, 16, 32, 64), (128, 256))]
        options += [(many, bn, bm, 128, w) for bn, bm, w in itertools.product((64, 128, 256), (64, 128, 256), (4, 8))]
        for (kernel, bn, bm, bk, warps), stages in itertools.product(options, (2, 3, 4)):
            if (kernel is few) != (m <= 64) or bm > 2 * max(m, 4):
                continue
            tile = {"BN": bn, "BM": bm, "BK": bk, "STAGES": stages, "EVEN": k % (bk * (4 if kernel is few else 1)) == 0}
            tile |= {"S": 4} if kernel is few else {"BAND": 8}
            choice = kernel, tile, warps
            with replaced(module, choose_kernel=lambda *_, choice=choice, **__: choice):
                yield timed(case | {"tile": "other", "warps": warps} | tile, measure)


def elementwise(shapes: list[tuple[int, int]]) -> Iterator[Row]:
    found = modules()
    for n, k in shapes:
        make = lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        x, packed_weight = make(), random_packed(n, k, 4, 128, "cuda")
        scale = round_scale(torch.rand(n, k // 128, device="cuda") / 8)
        backward, tiles = torch.ops.hfquant.fake_quantize_backward, [{"TILE": t} for t in (512, 1024, 2048, 4096)]
        calls: dict[str, tuple[list[Tile], Callable[[Tensor], Any]]] = {
            "dequantize": (
                [{"ROWS": r, "WORDS": w} for r, w in itertools.product((1, 2, 4, 8), (64, 128, 256, 512))],
                lambda _: dequantize_weight(*packed_weight, bits=4, in_features=k, dtype=torch.bfloat16),
            ),
            "fake_quantize": (tiles, lambda t: fake_quantize(t, scale, bits=4)),
            "fake_quantize_backward": (tiles, lambda t: backward(x, t, scale, None, 4)),
            "quantize_rows": ([{"WHOLE": w, "COLUMNS": 2048} for w in (0, 8192)], quantize_rows),
        }
        target = torch.empty_like(x)
        yield timed({"N": n, "K": k, "op": "copy"}, lambda: rotated(make, target.copy_, 2 * n * k))
        for op, (tiles, call) in calls.items():
            module = found[op.removesuffix("_backward")]
            for tile in ({}, *tiles):
                with replaced(module, **tile):
                    which = {"N": n, "K": k, "op": op, "tile": "other" if tile else "ours"} | tile
                    yield timed(which, lambda call=call: rotated(make, call, 2 * n * k))


def timed(row: Row, measure: Callable[[], float]) -> Row:
    attempt(row, "us", measure)
    return row


PARTS = {"packed": packed, "integers": integers, "elementwise": elementwise}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", type=int, help="only the last ONLY shapes")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    rows = []
    for row in PARTS[given.part](SHAPES[-given.only :] if given.only else SHAPES):
        rows.append(row)
        print(*(f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()))
    path = given.json or RESULTS / f"gpu-tiles-{given.part}.json"
    path.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed of the CPU kernels against torch's float layers, torch's own quantized ops and bitsandbytes.

    python benchmarks/cpu_kernels.py                 # every op x shapes of SmolLM2-135M, MiniLM and Llama-1B x M
    python benchmarks/cpu_kernels.py --only w8a8 --shapes 2048x2048 --rows 1,128

With one thread the clock is the thread's own CPU time, which other programs disturb less than wall time. Weights of
M <= 8 rotate over copies larger than the cache. Ops are timed beside what they are up against (reading memory up to 8
rows, INT8 products behind), of which they reach so many percent, and again in turns with the float layers, so that both
meet the same disturbances and cold caches: that is ``x float``. Each row shows the largest error, relative to the
largest result of a float64 product, and is refused if it is out of bounds. Limits of the machine are measured in the
same run (limits.cpp).
"""

import argparse
import ctypes
import importlib.util
import json
import platform
import statistics
import subprocess
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfquant.kernels import native
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.int4_linear import int4_linear
from hfquant.kernels.int8_linear import int8_linear
from hfquant.kernels.linear_op import ShortCut
from hfquant.numerics.affine import scale_to_bits


SHAPES = {
    "smollm2 q, o": (576, 576),
    "smollm2 k, v": (576, 192),
    "smollm2 up, gate": (576, 1536),
    "smollm2 down": (1536, 576),
    "smollm2 head": (576, 49152),
    "minilm qkv, o": (384, 384),
    "minilm up": (384, 1536),
    "minilm down": (1536, 384),
    "llama-1b q, o": (2048, 2048),
    "llama-1b k, v": (2048, 512),
    "llama-1b up, gate": (2048, 8192),
    "llama-1b down": (8192, 2048),
}
ROWS = (1, 8, 32, 128, 512)


@dataclass(frozen=True)
class Case:
    """One op: bits of the weight, group, kind of activations, dtype, and the largest relative error it may have.

    Quantized activations are dynamic; asymmetric, as models have them by default, or ``symmetric``. ``precision`` is
    what ``torch.set_float32_matmul_precision`` gets: of float32 activations that are not quantized.
    """

    bits: int
    group: int | None
    quantized: bool
    dtype: torch.dtype
    bound: float
    symmetric: bool = False
    precision: str = "highest"

    def arguments(self) -> dict[str, bool]:
        return {"dynamic": self.quantized, "asymmetric": self.quantized and not self.symmetric}


CASES = {
    "w8a8": Case(8, None, True, torch.float32, 2e-2),
    "w8a8 symmetric": Case(8, None, True, torch.float32, 2e-2, symmetric=True),
    "w8a8 bf16": Case(8, None, True, torch.bfloat16, 2e-2),
    "w8a16": Case(8, None, False, torch.float32, 2e-6),
    "w8a16 high": Case(8, None, False, torch.float32, 2e-4, precision="high"),
    "w8a16 medium": Case(8, None, False, torch.float32, 8e-3, precision="medium"),
    "w8a16 bf16": Case(8, None, False, torch.bfloat16, 8e-3),
    "w4a8 g32": Case(4, 32, True, torch.float32, 2e-2),
    "w4a8 g32 symmetric": Case(4, 32, True, torch.float32, 2e-2, symmetric=True),
    "w4a8 g128": Case(4, 128, True, torch.float32, 2e-2),
    "w4a16 g32": Case(4, 32, False, torch.float32, 2e-6),
    "w4a16 g32 high": Case(4, 32, False, torch.float32, 2e-4, precision="high"),
    "w4a16 g32 medium": Case(4, 32, False, torch.float32, 8e-3, precision="medium"),
    "w4a16 g32 bf16": Case(4, 32, False, torch.bfloat16, 8e-3),
    "w4a16 g128": Case(4, 128, False, torch.float32, 2e-6),
}


Calls = list[Callable[[], Any]]


def in_turns(rivals: list[Calls], budget: float) -> list[tuple[float, float]]:
    """Median of each rival's calls, one after the other, and the interquartile range, as a share of it."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in (call for calls in rivals for call in calls[:2]):
        call()
    times: list[list[float]] = [[] for _ in rivals]
    end = time.perf_counter() + budget * len(rivals)
    while (count := len(times[0])) < 5 or (time.perf_counter() < end and count < 2000):
        for calls, taken in zip(rivals, times, strict=True):
            call = calls[count % len(calls)]
            start = clock()
            call()
            taken.append(clock() - start)
    quartiles = [statistics.quantiles(taken, n=4) for taken in times]
    return [(middle, (high - low) / middle) for low, middle, high in quartiles]


def seconds(calls: Calls, budget: float) -> float:
    """Median of the calls in turn."""
    return in_turns([calls], budget)[0][0]


@dataclass(frozen=True)
class Limit:
    """What one thread can do: calls that do only that, how much each does, the best rate in billions a second."""

    calls: Calls
    amount: float
    rate: float


def machine_limits() -> dict[str, Limit]:
    """``read``: bytes from memory; ``int8``: operations. Without a compiler or VNNI they are missing."""
    limits: dict[str, Limit] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).parent / "limits.cpp"
        command = ["g++", "-O3", "-mavx2", "-shared", "-fPIC", str(source), "-o", str(library)]
        if platform.machine() != "x86_64" or subprocess.run(command, check=False).returncode:
            return limits
        functions = ctypes.CDLL(str(library))
    functions.read_memory.argtypes, functions.multiply.argtypes = (
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
        [ctypes.c_int64],
    )
    memory = torch.ones(1 << 27, dtype=torch.int32)
    read = {  # rows near each other, and far apart
        near: best_of(lambda row=row: functions.read_memory(memory.data_ptr(), memory.nbytes, row))
        for near, row in ((True, 2048), (False, memory.nbytes // 4))
    }
    best = min(read, key=read.__getitem__)
    parts = memory.split(1 << 23)  # 32 MiB each
    row = 2048 if best else parts[0].nbytes // 4
    calls = [lambda p=p: functions.read_memory(p.data_ptr(), p.nbytes, row) for p in parts]
    limits["read"] = Limit(calls, parts[0].nbytes, memory.nbytes / read[best] / 1e9)
    if native.instruction_sets().get("avx512"):
        rate = 12 * 128 * 3_000_000 / best_of(lambda: functions.multiply(3_000_000)) / 1e9
        limits["int8"] = Limit([lambda: functions.multiply(100_000)], 12 * 128 * 100_000, rate)
    return limits


def call_overhead() -> dict[str, float]:
    """Microseconds of a call with next to nothing to multiply, of the op that layers call and of ``F.linear``."""
    if not native.instruction_sets():
        return {}
    op = ShortCut("int8_linear").op
    x, layer = torch.randn(1, 64), torch.randn(4, 64)
    weight = packed(CASES["w8a8"], 64, 4)
    calls = {
        "call_us": lambda: op(x, *weight, None, None, True, True, 0),
        "call_float_us": lambda: torch.nn.functional.linear(x, layer),
    }
    return {name: min(timeit.repeat(call, number=5000, repeat=9)) / 5000 * 1e6 for name, call in calls.items()}


def best_of(call: Callable[[], Any], times: int = 5) -> float:
    found = []
    for _ in range(times):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return min(found)


def packed(case: Case, k: int, n: int) -> tuple[Tensor, Tensor, None]:
    words = torch.randint(-(2**31), 2**31 - 1, (n, k * case.bits // 32), dtype=torch.int32)
    scale = torch.rand(n, k // (case.group or k)) * 0.01 + 0.001
    return words, scale_to_bits(scale), None


def copies(bytes_of_one: int, rows: int, cache: int) -> int:
    return max(1, cache // bytes_of_one) if rows <= 8 else 1


def float_layers(k: int, n: int, m: int, options: argparse.Namespace) -> dict[str, Calls]:
    """Calls of ``F.linear`` in float32 and bfloat16."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(m, k).to(dtype)
        weights = [torch.randn(n, k).to(dtype) for _ in range(copies(k * n * dtype.itemsize, m, options.cache))]
        found[name] = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]
    return found


def peer_rows(k: int, n: int, m: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of torch's own quantized ops and bitsandbytes' layers."""
    found = {}
    scale, x, y = torch.rand(n), torch.randn(m, k), torch.randn(m, k).bfloat16()

    def int_mm(turned: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return torch._int_mm((x / step).round().to(torch.int8), turned) * step * scale

    codes = [torch.randint(-127, 128, (n, k), dtype=torch.int8).t() for _ in range(copies(k * n, m, options.cache))]
    found["torch int8"] = seconds([lambda c=c: int_mm(c) for c in codes], options.budget)
    if k % 32 == 0 and n % 16 == 0:
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
        scales = torch.rand(k // 32, n, 2).bfloat16()
        packed4 = [words.clone() for _ in range(copies(words.nbytes, m, options.cache))]
        calls = [lambda w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(y, w, 32, scales) for w in packed4]
        found["torch int4"] = seconds(calls, options.budget)
    return found | bitsandbytes_rows(k, n, m, options)


def bitsandbytes_rows(k: int, n: int, m: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of bitsandbytes' INT8 and NF4 layers, where it is installed."""
    if options.smoke or importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes

    found, layer = {}, torch.nn.Linear(k, n, bias=False)
    kinds = {
        "bnb int8": (bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False), torch.bfloat16),
        "bnb nf4": (bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16), torch.bfloat16),
    }
    for name, (module, dtype) in kinds.items():
        module.load_state_dict(layer.state_dict())
        module = module.to("cpu")
        x = torch.randn(m, k).to(dtype)
        found[name] = seconds([lambda module=module, x=x: module(x)], options.budget)
    return found


def measure(
    name: str,
    case: Case,
    shape: tuple[int, int, int],
    floats: dict[str, Calls],
    limits: dict[str, Limit],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row: the op ``name`` for ``shape`` (K, N, M)."""
    k, n, m = shape
    x = torch.randn(m, k).to(case.dtype)
    op = int4_linear if case.bits == 4 else int8_linear
    one = packed(case, k, n)
    size = sum(tensor.nbytes for tensor in one[:2])
    weights = [one, *(packed(case, k, n) for _ in range(copies(size, m, options.cache) - 1))]
    torch.set_float32_matmul_precision(case.precision)
    error = relative_error(op(x, *one, **case.arguments()), x, one, case, k)
    if not error <= case.bound:
        raise SystemExit(f"{name} {k}x{n} M={m}: error {error:.2e} of the largest result, allowed {case.bound:.0e}")
    calls = [lambda w=w: op(x, *w, **case.arguments()) for w in weights]
    near = limits.get("read" if m <= 8 else "int8")  # which of them it is up against
    rivals = [calls, *([near.calls] if near else [])]
    if m <= 8:  # one after the other: reading memory would empty the caches that the next call finds
        (middle, spread), *probe = [in_turns([rival], options.budget)[0] for rival in rivals]
    else:
        (middle, spread), *probe = in_turns(rivals, options.budget)
    (beside, _), *others = in_turns([calls, *floats.values()], options.budget)
    times = {key: other[0] for key, other in zip(floats, others, strict=True)}
    torch.set_float32_matmul_precision("highest")
    rates = {"read": size / middle / 1e9, "int8": 2 * m * n * k / middle / 1e9}
    best = {key: limit.amount / probe[0][0] / 1e9 if limit is near else limit.rate for key, limit in limits.items()}
    return {
        "op": name,
        "M": m,
        "us": middle * 1e6,
        "spread": spread,
        "max_error": error,
        "speedup": min(times.values()) / beside,
        "times_fp32": times["fp32"] / beside,
        "GB_s": rates["read"],
        "GOP_s": rates["int8"],
        **{f"of_{key}": rates[key] / value for key, value in best.items()},
    }


def relative_error(found: Tensor, x: Tensor, weight: tuple[Tensor, Tensor, None], case: Case, k: int) -> float:
    values = dequantize_weight(*weight, bits=case.bits, in_features=k, dtype=torch.float32)
    keep = torch.randperm(len(values))[:256]  # 256 columns are enough to find an error
    oracle = x.double() @ values[keep].double().t()
    return float((found[:, keep].double() - oracle).abs().max() / oracle.abs().max())


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops, comma-separated; default all")
    parser.add_argument("--shapes", default="", help="KxN, comma-separated; default those of the three models")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=int, default=400_000_000, help="bytes of weights to rotate over at M <= 8")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each figure")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--smoke", action="store_true", help="one small shape, in a second")
    options = parser.parse_args(given)
    if options.smoke:
        options.shapes, options.rows, options.cache, options.budget = "256x96", "1,16", 1, 0.005
    return options


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    options = arguments(given)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    limits = {} if options.smoke else machine_limits()
    measured = {f"{name}_G_s": limit.rate for name, limit in limits.items()}
    names = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    cpu = next(names, platform.machine())
    print(f"{cpu}, {options.threads} thread(s), kernels {native.name()}, torch {torch.__version__}")
    with torch.inference_mode():
        measured |= {} if options.smoke else call_overhead()
    print(", ".join(f"{name} {value:.1f}" for name, value in measured.items()))
    shapes = {s: tuple(map(int, s.split("x"))) for s in options.shapes.split(",") if s} or SHAPES
    cases = {name: case for name, case in CASES.items() if not options.only or name in options.only.split(",")}
    rows = []
    with torch.inference_mode():
        for layer, (k, n) in shapes.items():
            for m in map(int, options.rows.split(",")):
                layers = float_layers(k, n, m, options)
                floats = {name: seconds(calls, options.budget) for name, calls in layers.items()}
                floats |= peer_rows(k, n, m, options)
                print(f"\n{layer} {k}x{n} M={m}: " + ", ".join(f"{a} {b * 1e6:.0f} us" for a, b in floats.items()))
                for name, case in cases.items():
                    row = {"layer": layer, "K": k, "N": n} | measure(name, case, (k, n, m), layers, limits, options)
                    row["floats"] = floats
                    rows.append(row)
                    print(_line(row), flush=True)
    torch.set_num_threads(before)
    if options.json:
        options.json.write_text(json.dumps({"cpu": cpu, "limits": measured, "rows": rows}, indent=1) + "\n")
    return rows


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _exact(row: dict[str, Any]) -> str:
    """Float32 that is computed as such is not what torch computes in bfloat16: beside its float32."""
    kept = CASES[row["op"]].dtype == torch.float32 and row["max_error"] < 1e-5
    return f" ({row['times_fp32']:5.2f}x float32)" if kept else " " * 17


def _line(row: dict[str, Any]) -> str:
    read, peak = (f" ({100 * row[key]:3.0f} %)" if key in row else "" for key in ("of_read", "of_int8"))
    times = f"{row['us']:9.1f} us +-{50 * row['spread']:3.0f} %  {row['speedup']:5.2f}x float{_exact(row)}"
    return (
        f"  {row['op']:<18} {times}"
        f"  {row['GB_s']:6.1f} GB/s{read}  {row['GOP_s']:7.1f} GOP/s{peak}  max error {row['max_error']:.1e}"
    )


if __name__ == "__main__":
    main()

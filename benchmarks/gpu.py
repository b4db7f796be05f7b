"""Speed and parity of the GPU kernels beside cuBLAS and other libraries, on one NVIDIA GPU.

    python benchmarks/gpu.py parity       # every op and shape against its reference; assembly against its plain twin
    python benchmarks/gpu.py linears      # INT4 and INT8 weights, M = 1 to 64, beside bf16, tinygemm, gemlite, bnb, HQQ
    python benchmarks/gpu.py crossover    # fused kernel or dequantize + cuBLAS, M = 32 to 4096
    python benchmarks/gpu.py integers     # W8A8 at M = 16 to 8192, beside bf16 and torch._int_mm
    python benchmarks/gpu.py elementwise  # dequantize, fake quantize, grid weight, rows: share of copy bandwidth
    python benchmarks/gpu.py decode       # tokens a second of a 1B- and 8B-shaped model, static cache, CUDA graphs
    python benchmarks/gpu.py train        # a step of fine-tuning and QAT beside bf16 LoRA, full training, torchao's QAT

Each part takes under 10 minutes and writes benchmarks/results/gpu-<part>.json. ``--dry-run`` stops before the first
call to CUDA. Weights rotate through more memory than the L2 cache holds; times are medians of CUDA graph replays.
Libraries that are not installed are listed with the reason; nothing is downloaded.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

import hfquant
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.dequantize.reference import dequantize_reference
from hfquant.kernels.dispatch import choices
from hfquant.kernels.expert_linear import expert_linear
from hfquant.kernels.fake_quantize import fake_quantize
from hfquant.kernels.fake_quantize.reference import fake_quantize_backward_reference, fake_quantize_reference
from hfquant.kernels.grid_weight import grid_weight
from hfquant.kernels.grid_weight.reference import grid_weight_reference
from hfquant.kernels.int4_linear import int4_linear
from hfquant.kernels.int8_linear import int8_linear
from hfquant.kernels.quant_embedding import quant_embedding
from hfquant.kernels.quantize_rows import quantize_rows
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference
from hfquant.numerics.affine import round_scale, scale_to_bits
from hfquant.numerics.packing import PackedWeight


RESULTS = Path(__file__).with_name("results")
LLAMA_8B = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
LLAMA_1B = [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)]
QWEN3 = [(2048, 1024), (1024, 2048), (3072, 1024), (1024, 3072), (9728, 2560), (2560, 9728)]
LARGE = [(8192, 8192), (28672, 8192)]
OPS = {4: int4_linear, 8: int8_linear}
CACHE_BYTES = 256 << 20
"""Weights rotate through this much, several times an L2 cache."""

Row = dict[str, Any]


def machine() -> Row:
    properties = torch.cuda.get_device_properties(0)
    return {
        "machine": f"{properties.name}, {properties.multi_processor_count} processors, {platform.machine()}",
        "versions": f"hfquant {hfquant.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "kernels": {choice.op: choice.implementation for choice in choices() if choice.device == "cuda"},
        "date": time.strftime("%Y-%m-%d"),
    }


def random_packed(n: int, k: int, bits: int, group: int | None, device: str, *, zero: bool = False) -> PackedWeight:
    """Random codes, scales and zero points, as they are stored."""
    groups = k // (group or k)
    words = torch.randint(-(2**31), 2**31, (n, k * bits // 32), dtype=torch.int32, device=device)
    scale = scale_to_bits(torch.rand(n, groups, device=device) * 0.01 + 0.005)
    width = -(-groups * bits // 32)
    zeros = torch.randint(-(2**31), 2**31, (n, width), dtype=torch.int32, device=device) if zero else None
    return PackedWeight(words, scale, zeros)


def median_us(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Median microseconds of one call, from replays of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    stream, graph, times = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def rotated(make: Callable[[], Any], call: Callable[[Any], Any], weight_bytes: int) -> float:
    """``median_us`` over enough copies of the weight that the L2 cache holds none of them."""
    copies = [make() for _ in range(max(2, CACHE_BYTES // max(weight_bytes, 1) + 1))]
    return median_us([lambda copy=copy: call(copy) for copy in copies])


def attempt(row: Row, name: str, measure: Callable[[], float]) -> None:
    """Put a time into ``row``, or why there is none."""
    try:
        row[name] = measure()
    except Exception as error:  # another library may be missing or refuse a shape; the table says so
        row[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


# parity ------------------------------------------------------------------------------------------------------------


def is_near(result: Tensor, oracle: Tensor, plain: Tensor) -> bool:
    """The policy of tests/support/tolerance.py: twice the error of the plain formula in the same dtype, and a floor."""
    floor = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[result.dtype] * float(
        oracle.abs().max()
    )
    return float((result.double() - oracle).abs().max()) <= 2 * float((plain.double() - oracle).abs().max()) + floor


def assembly_rows(device: str) -> list[Row]:
    from hfquant.kernels.packed_matmul import triton as module

    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for group, m in ((128, 1), (128, 16), (64, 8), (32, 4), (128, 40)):
            x, packed = torch.randn(m, 4096, device=device, dtype=dtype), random_packed(4096, 4096, 4, group, device)
            results = []
            for interpreted in (False, True):  # the twin of the assembly, compiled
                module.INTERPRETED = interpreted
                results.append(module.packed_matmul(x, packed, bits=4))
            module.INTERPRETED = False
            rows.append({"check": f"assembly {dtype} g{group} M={m}", "ok": torch.equal(*results)})
    return rows


def linear_parity(device: str, shapes: list[tuple[int, int]]) -> list[Row]:
    rows = []
    schemes = [(4, 32, False), (4, 64, True), (4, 128, False), (4, None, False), (8, None, False), (8, 128, True)]
    for (n, k), (bits, group, zero) in ((shape, scheme) for shape in shapes for scheme in schemes):
        packed = random_packed(n, k, bits, group, device, zero=zero)
        values = dequantize_reference(*packed, bits, k, torch.float64)
        for m, dtype in (
            (1, torch.bfloat16),
            (7, torch.float16),
            (16, torch.bfloat16),
            (50, torch.float16),
            (300, torch.bfloat16),
        ):
            x, bias = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, device=device, dtype=dtype)
            result = OPS[bits](x, *packed, bias=bias)
            near = is_near(result, linear(x.double(), values, bias.double()), linear(x, values.to(dtype), bias))
            same = torch.equal(result, OPS[bits](x, *packed, bias=bias))
            rows.append({"check": f"linear {bits} g{group} zero={zero} {n}x{k} M={m} {dtype}", "ok": near and same})
            for asymmetric in (False, True):
                codes, scale, zero_point = quantize_rows(x, asymmetric=asymmetric)
                same = torch.equal(codes.cpu(), quantize_rows_reference(x.cpu(), None, asymmetric)[0])
                rounded = (codes.double() - zero_point.double()) * scale.double()
                result = OPS[bits](x, *packed, bias=bias, dynamic=True, asymmetric=asymmetric)
                plain = linear(rounded.to(dtype), values.to(dtype), bias)
                near = is_near(result, linear(rounded, values, bias.double()), plain)
                name = f"dynamic {bits} g{group} asymmetric={asymmetric} {n}x{k} M={m} {dtype}"
                rows.append({"check": name, "ok": near and same})
    return rows


def value_parity(device: str) -> list[Row]:
    rows: list[Row] = []
    for n, k in (*LLAMA_1B, (1000, 4100)):
        for bits, group in ((4, None), (8, None), (4, 4), (8, 4)):
            packed = random_packed(n, k, bits, group, device, zero=True) if k * bits % 32 == 0 else None
            if packed is not None:
                whole = dequantize_weight(*packed, bits=bits, in_features=k, dtype=torch.bfloat16)
                parts = (None if tensor is None else tensor.cpu() for tensor in packed)
                ok = torch.equal(whole.cpu(), dequantize_reference(*parts, bits, k, torch.bfloat16))
                ids = torch.randint(0, n, (33,), device=device)
                found = quant_embedding(ids, *packed, bits=bits, embedding_dim=k, dtype=torch.bfloat16)
                rows.append(
                    {
                        "check": f"dequantize, embedding {bits} g{group} {n}x{k}",
                        "ok": ok and torch.equal(found, whole[ids]),
                    }
                )
        for dtype in (torch.float32, torch.bfloat16):
            x, scale = (
                torch.randn(n, k, device=device, dtype=dtype),
                round_scale(torch.rand(n, k // 4, device=device) / 8),
            )
            leaf, leaf_scale = x.requires_grad_(), scale.requires_grad_()
            out, grad = fake_quantize(leaf, leaf_scale, bits=4), torch.randn_like(x)
            out.backward(grad)
            host = [tensor.detach().cpu() for tensor in (grad, x, scale)]
            ok = torch.equal(out.detach().cpu(), fake_quantize_reference(*host[1:], None, 4))
            expected = fake_quantize_backward_reference(*host, None, 4)
            ok = (
                ok
                and torch.equal(leaf.grad.cpu(), expected[0])
                and torch.allclose(leaf_scale.grad.cpu(), expected[1], 1e-5, 1e-5)
            )
            rows.append({"check": f"fake quantize {dtype} {n}x{k}", "ok": ok})
        codes, residual = (random_packed(n, k // 8 * 8, 4, 8, device).weight for _ in range(2))
        delta, scale = torch.randn(n, k // 8 * 8, device=device), round_scale(torch.rand(n, k // 8, device=device) / 8)
        found = grid_weight(codes, residual, delta, scale, dtype=torch.bfloat16).cpu()
        expected = grid_weight_reference(*(t.cpu() for t in (codes, residual, delta, scale)), None, 4, torch.bfloat16)
        rows.append({"check": f"grid weight {n}x{k}", "ok": torch.equal(found, expected)})
    return rows + expert_parity(device)


def expert_parity(device: str) -> list[Row]:
    rows = []
    for bits, group in ((4, 128), (4, 32), (8, None)):
        weights = [random_packed(1536, 2048, bits, group, device) for _ in range(16)]
        stacked = torch.stack([w.weight for w in weights]), torch.stack([w.weight_scale for w in weights])
        ends = torch.randint(0, 20, (16,), device=device).cumsum(0).int()
        x = torch.randn(int(ends[-1]) + 3, 2048, device=device, dtype=torch.bfloat16)
        result, start, ok = expert_linear(x, ends, *stacked, bits=bits), 0, True
        for weight, end in zip(weights, ends.tolist(), strict=True):
            values = dequantize_reference(*weight, bits, 2048, torch.float64)
            part = x[start:end]
            if end > start:
                ok &= is_near(result[start:end], linear(part.double(), values), linear(part, values.to(x.dtype)))
            start = end
        rows.append({"check": f"experts {bits} g{group}", "ok": bool(ok and (result[start:] == 0).all())})
    return rows


def parity(device: str, shapes: list[tuple[int, int]]) -> list[Row]:
    rows = [*assembly_rows(device), *value_parity(device), *linear_parity(device, shapes)]
    failed = [row["check"] for row in rows if not row["ok"]]
    print(f"{len(rows)} checks, {len(failed)} failed", *failed[:20], sep="\n")
    return rows


# tables ------------------------------------------------------------------------------------------------------------


def tinygemm(n: int, k: int) -> Callable[[Tensor], Tensor]:
    codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


def gemlite(n: int, k: int) -> Callable[[Tensor], Tensor]:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(
        4, group_size=128, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
    )
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n * k // 128, 1, device="cuda", dtype=torch.bfloat16)
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    return layer


def bitsandbytes_nf4(n: int, k: int) -> Callable[[Tensor], Tensor]:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16), quant_type="nf4"
    )
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def hqq(n: int, k: int) -> Callable[[Tensor], Tensor]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    settings = BaseQuantizeConfig(nbits=4, group_size=128, axis=1)
    return HQQLinear(layer, settings, compute_dtype=torch.bfloat16, device="cuda")


def torchao_int4(n: int, k: int) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Sequential(nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16))
    quantize_(layer, Int4WeightOnlyConfig(group_size=128))
    return layer


PEERS = {"tinygemm": tinygemm, "torchao": torchao_int4, "gemlite": gemlite, "bnb nf4": bitsandbytes_nf4, "hqq": hqq}


def peer_time(build: Callable[..., Callable[[Tensor], Tensor]], n: int, k: int, x: Tensor) -> float:
    with torch.no_grad():
        return rotated(lambda: build(n, k), lambda layer: layer(x), n * k // 2)


def float_time(n: int, k: int, x: Tensor) -> float:
    return rotated(lambda: torch.randn(n, k, device="cuda", dtype=x.dtype), lambda w: linear(x, w), n * k * 2)


def packed_time(n: int, k: int, x: Tensor, bits: int, group: int | None, **arguments: Any) -> float:
    make = lambda: random_packed(n, k, bits, group, "cuda")
    return rotated(make, lambda packed: OPS[bits](x, *packed, **arguments), n * k * bits // 8)


def linears(device: str, shapes: list[tuple[int, int]]) -> list[Row]:
    rows = []
    for n, k in shapes:
        for m in (1, 4, 8, 16, 32, 64):
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            row: Row = {"N": n, "K": k, "M": m, "bf16": float_time(n, k, x)}
            for bits, group in ((4, 32), (4, 64), (4, 128), (8, None)):
                name = f"int{bits} g{group}" if group else f"int{bits}"
                attempt(row, name, lambda b=bits, g=group: packed_time(n, k, x, b, g))
            for name, build in PEERS.items():
                if m in (1, 16, 64):
                    attempt(row, name, lambda build=build: peer_time(build, n, k, x))
            row["speedup int4 g128"] = row["bf16"] / row["int4 g128"]
            rows.append(row)
    return rows


def crossover(device: str, shapes: list[tuple[int, int]]) -> list[Row]:
    from hfquant.kernels.int4_linear import triton as module

    rows, limit = [], module.FUSED_ROWS
    for n, k in shapes:
        for m in (32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096):
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            row: Row = {"N": n, "K": k, "M": m, "bf16": float_time(n, k, x)}
            for name, rows_fused in (("fused", 1 << 30), ("dequantized", 0)):
                module.FUSED_ROWS = rows_fused
                attempt(row, name, lambda: packed_time(n, k, x, 4, 128))
            module.FUSED_ROWS = limit
            rows.append(row)
    return rows


def integers(device: str, shapes: list[tuple[int, int]]) -> list[Row]:
    rows = []
    for n, k in shapes:
        for m in (16, 64, 256, 1024, 4096, 8192):
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            row: Row = {"N": n, "K": k, "M": m, "bf16": float_time(n, k, x)}
            attempt(row, "w8a8 dynamic", lambda: packed_time(n, k, x, 8, None, dynamic=True))
            attempt(row, "with zero points", lambda: packed_time(n, k, x, 8, None, dynamic=True, asymmetric=True))
            scale = scale_to_bits(torch.tensor([0.03], device=device))
            attempt(row, "w8a8 static", lambda: packed_time(n, k, x, 8, None, input_scale=scale))
            codes = quantize_rows(x)[0]
            make = lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            attempt(row, "torch._int_mm", lambda: rotated(make, lambda w: torch._int_mm(codes, w.t()), n * k))
            rows.append(row)
    return rows


def elementwise(device: str, shapes: list[tuple[int, int]]) -> list[Row]:
    rows = []
    for n, k in shapes:
        make = lambda: torch.randn(n, k, device=device, dtype=torch.bfloat16)
        x, size = make(), n * k
        scale = round_scale(torch.rand(n, k // 128, device=device) / 8)
        target, packed = torch.empty_like(x), random_packed(n, k, 4, 128, device)
        copy = 4 * size / rotated(make, target.copy_, 2 * size)
        calls: dict[str, tuple[float, Callable[[Tensor], Any]]] = {
            "fake_quantize": (4, lambda t: fake_quantize(t, scale, bits=4)),
            "fake_quantize_backward": (6, lambda t: torch.ops.hfquant.fake_quantize_backward(x, t, scale, None, 4)),
            "grid_weight": (5, lambda t: grid_weight(packed.weight, packed.weight, t, scale, dtype=t.dtype)),
            "quantize_rows": (3, quantize_rows),
            "dequantize": (2.5, lambda t: dequantize_weight(*packed, bits=4, in_features=k, dtype=torch.bfloat16)),
        }
        row: Row = {"N": n, "K": k, "copy GB/s": copy / 1e3}
        for name, (moved, call) in calls.items():
            attempt(
                row, f"{name} % of copy", lambda m=moved, c=call: 100 * m * size / rotated(make, c, 2 * size) / copy
            )
        rows.append(row)
    return rows


# whole models ------------------------------------------------------------------------------------------------------

MODELS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def build_model(name: str, device: str, bits: int | None) -> nn.Module:
    config = transformers.LlamaConfig(
        **MODELS[name], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if bits is not None:
        options = {"quantization_type": "weight_only", "algorithm": "rtn", "progress": False}
        hfquant.quantize_model_ptq(model, quantization_bits=bits, group_size=128 if bits == 4 else -1, **options)
    return model.eval()


def step_ms(model: nn.Module, ids: Tensor, tokens: int) -> float:
    """Median milliseconds of one token: the model alone, compiled and captured, without the loop of ``generate``."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=len(ids[0]) + tokens)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        for _ in range(tokens):
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            step(ids[:, :1], past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[len(times) // 2 :])


def decode(device: str, names: list[str], tokens: int = 128) -> list[Row]:
    rows = []
    for name in names:
        row: Row = {"model": name, "tokens": tokens}
        for bits in (None, 8, 4):
            model = build_model(name, device, bits)
            ids = torch.randint(0, 128000, (1, 32), device=device)
            options = {
                "cache_implementation": "static",
                "do_sample": False,
                "max_new_tokens": tokens,
                "min_new_tokens": tokens,
            }
            for _ in range(2):  # compiles, then captures
                model.generate(ids, **options)
            times = []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                model.generate(ids, **options)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            precision = f"int{bits}" if bits else "bf16"
            row[f"{precision} tokens/s"] = tokens / statistics.median(times)
            attempt(row, f"{precision} ms a step", lambda model=model: step_ms(model, ids, 64))
            del model
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        row["speedup int4"] = row["int4 tokens/s"] / row["bf16 tokens/s"]
        attempt(row, "speedup of a step", lambda: row["bf16 ms a step"] / row["int4 ms a step"])
        rows.append(row)
    return rows


TRAINED = ("bf16 LoRA", "int4 side", "int4 grid", "int4 scales", "QAT lora", "full", "QAT full", "torchao QAT full")
"""Arms of ``train``: those without "full" train adapters or scales of a bfloat16 or packed model; "full" has float32
weights, all of which train, and computes in bfloat16 by autocast."""


def trainable(arm: str, model: nn.Module) -> nn.Module:
    """``model`` with what ``arm`` trains."""
    scheme = {"quantization_bits": 4, "quantization_type": "weight_only", "group_size": 128, "embedding_bits": 16}
    if arm.startswith("int4"):
        return hfquant.prepare_model_for_finetuning(model, arm.split()[1], rank=16, progress=False)
    if arm.startswith("QAT"):
        return hfquant.prepare_model_qat(model, variant=arm.split()[1], progress=False, **scheme)
    if arm.startswith("torchao"):
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.qat import QATConfig

        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))
        is_linear = lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
        quantize_(model, QATConfig(config, step="prepare"), filter_fn=is_linear)
        return model
    if arm == "bf16 LoRA":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    return model


def step_seconds(model: nn.Module, ids: Tensor, *, mixed: bool, steps: int = 8) -> float:
    """Median seconds of a training step, without the first three."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def train(device: str, names: list[str], shape: tuple[int, int] = (4, 1024)) -> list[Row]:
    rows = []
    for name in names:
        for arm in TRAINED:
            torch.cuda.reset_peak_memory_stats()
            row: Row = {"model": name, "arm": arm, "tokens": shape[0] * shape[1]}
            mixed = arm.endswith("full")

            def measured(arm: str = arm, mixed: bool = mixed, name: str = name) -> float:
                model = build_model(name, device, 4 if arm.startswith("int4") else None)
                model = trainable(arm, model.float() if mixed else model).train()
                torch.cuda.reset_peak_memory_stats()
                return step_seconds(model, torch.randint(0, 128000, shape, device=device), mixed=mixed)

            attempt(row, "ms", lambda: 1e3 * measured())
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
            row["tokens/s"] = 1e3 * row["tokens"] / row["ms"] if isinstance(row["ms"], float) else ""
            rows.append(row)
            gc.collect()
            torch.cuda.empty_cache()
    return rows


PARTS: dict[str, tuple[Callable[..., list[Row]], list[Any]]] = {
    "parity": (parity, [*LLAMA_1B, *LLAMA_8B, *QWEN3]),
    "linears": (linears, [*LLAMA_8B, *LARGE]),
    "crossover": (crossover, [(4096, 4096), (14336, 4096), (8192, 8192)]),
    "integers": (integers, [*LLAMA_8B[2:], (4096, 4096), (8192, 8192)]),
    "elementwise": (elementwise, [(4096, 4096), (14336, 4096), (8192, 8192)]),
    "decode": (decode, ["1B", "8B"]),
    "train": (train, ["1B"]),
}


def table(rows: list[Row]) -> str:
    """The rows, in Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        text.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", type=int, help="only the first ONLY shapes or models")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--dry-run", action="store_true", help="everything up to the first call to CUDA")
    given = parser.parse_args(words)
    measure, cases = PARTS[given.part]
    cases = cases[: given.only]
    print(f"{given.part}: {len(cases)} shapes or models: {cases}")
    if given.dry_run:
        print(f"would write {(given.json or RESULTS / f'gpu-{given.part}.json').name}; no CUDA call was made")
        return 0
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    result = machine() | {"rows": measure("cuda", cases)}
    if given.part != "parity":
        print(table(result["rows"]))
    path = given.json or RESULTS / f"gpu-{given.part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.get("ok", True) for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())

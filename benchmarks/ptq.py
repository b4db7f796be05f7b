"""Calibrated INT4 on a language model, ours and other packages', on the same tokens, judged by one program.

    python benchmarks/ptq.py --text wikitext2-valid.txt --peer auto-round=PYTHON --peer nf4=PYTHON

Calibrates on the first 70 % of --text and measures on its last 30 %: perplexity, mean KL and top-1 agreement against
the float model. Embeddings and head stay in float, as the peers leave them. A peer runs in its own environment: give
the interpreter that has it. Every row states seconds; all have 4-bit linear layers with groups of --group-size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfquant import dequantize_model, quantize_model_ptq
from hfquant.evaluation.compare import compare_models


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

OURS = ("rtn", "search", "gptq", "signround")
CALIBRATION_SHARE = 0.7


def our_model(source: Path, algorithm: str, rows: torch.Tensor, options: argparse.Namespace) -> tuple[Any, float]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    data = {"calibration_data": [{"input_ids": part} for part in rows.split(4)]} if algorithm in OURS[2:] else {}
    started = time.perf_counter()
    quantize_model_ptq(
        model,
        quantization_bits=4,
        quantization_type="weight_only",
        group_size=options.group_size,
        embedding_bits=16,
        algorithm=algorithm,
        iterations=options.iterations,
        progress=not options.smoke,
        **data,
    )
    return dequantize_model(model), time.perf_counter() - started


def peer_model(
    source: Path, peer: str, python: str, rows: torch.Tensor, options: argparse.Namespace
) -> tuple[Any, float]:
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder) / "tokens.safetensors", Path(folder) / "out"
        save_file({"input_ids": rows}, tokens)
        command = [python, str(Path(__file__).with_name("ptq_peers.py")), peer, "--model", str(source)]
        command += ["--tokens", str(tokens), "--out", str(out), "--iters", str(options.iterations)]
        subprocess.run([*command, "--group-size", str(options.group_size)], check=True)
        record = json.loads((out / "peer.json").read_text())
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), record["seconds"]


def rows_of(source: Path, calibration: torch.Tensor, ids: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """One row a method, all compared with the float model in one pass."""
    models, seconds = {}, {}
    for algorithm in options.ours:
        models[algorithm], seconds[algorithm] = our_model(source, algorithm, calibration, options)
    for given in options.peer:
        peer, _, python = given.partition("=")
        models[peer], seconds[peer] = peer_model(source, peer, python, calibration, options)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = compare_models(original, models, ids, context=options.context, progress=not options.smoke)
    rows = []
    for name, result in found.items():
        increase = 100 * (result.perplexity / result.reference_perplexity - 1)
        measured = {"perplexity": result.perplexity, "increase_percent": increase, "mean_kl": result.mean_kl}
        rows.append({"method": name, **measured, "top1_percent": 100 * result.top1_agreement, "seconds": seconds[name]})
    return rows


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model; default: the demo's")
    parser.add_argument("--text", type=Path, help="UTF-8 text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to measure on; 0 takes all")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--ours", nargs="*", default=list(OURS), choices=OURS)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    return parser.parse_args(given)


def windows_of(ids: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    whole = ids[: len(ids) // options.context * options.context].view(-1, options.context)
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[: options.samples]
    return whole[chosen.sort().values]


def smoke_rows(options: argparse.Namespace) -> list[dict]:
    options.context, options.samples, options.iterations, options.group_size = 16, 4, 2, 32
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
        ids = torch.arange(256) * 7 % 250
        return rows_of(Path(folder), windows_of(ids, options), ids[:64], options)


def main(given: list[str] | None = None) -> dict[str, Any]:
    from quality import machine, table

    options = arguments(given)
    results: dict[str, Any] = machine() | {"command": "python benchmarks/ptq.py " + " ".join(given or sys.argv[1:])}
    if options.smoke:
        results["rows"] = smoke_rows(options)
    else:
        from demo_models import fetch_smollm2

        from hfquant.cli.text import default_text

        source = options.model or fetch_smollm2()[0]
        text = options.text.read_text(encoding="utf-8") if options.text else default_text()
        cut = int(len(text) * CALIBRATION_SHARE)
        tokenizer = AutoTokenizer.from_pretrained(source)
        calibration, ids = (
            tokenizer(t, return_tensors="pt", verbose=False)["input_ids"][0] for t in (text[:cut], text[cut:])
        )
        ids = ids[: options.tokens or None]
        results |= {"tokens": len(ids), "calibration_windows": options.samples, "iterations": options.iterations}
        results["rows"] = rows_of(source, windows_of(calibration, options), ids, options)
    for key, value in results.items():
        print("\n" + table(value) if isinstance(value, list) else f"{key}: {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()

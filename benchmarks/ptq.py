"""Calibrated INT4 on a language model, ours and other packages', on the same tokens, judged by one program.

    python benchmarks/ptq.py --text wikitext2-valid.txt --keep DIR --peer auto-round:50=PYTHON --peer nf4=PYTHON

Calibrates on the first 70 % of --text and measures on its last 30 %, and on --second-text if there is one: perplexity,
mean KL and top-1 agreement against the float model. Embeddings and head stay in float, as the peers leave them. A peer
runs in its own environment: give the interpreter that has it. ``:50`` behind a name are iterations, ``:200:1`` behind
one of ours iterations and the windows that one of them sees (4). Every row states seconds; all have 4-bit linear layers
with groups of --group-size. With --keep the models stay in DIR, and what is there already is not made again: the long
runs can be done one by one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfquant import dequantize_model, quantize_model_ptq
from hfquant.evaluation.compare import compare_models


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

OURS = ("rtn", "search", "awq", "gptq", "signround")
CALIBRATION_SHARE = 0.7


def numbers_of(method: str, options: argparse.Namespace) -> tuple[int, int]:
    """Iterations, and windows in a batch: what one iteration sees."""
    given = [int(number) for number in method.split(":")[1:]]
    iterations, windows = given + [options.iterations, 4][len(given) :]
    return iterations, windows


def our_model(source: Path, method: str, rows: torch.Tensor, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    algorithm, (iterations, windows) = method.partition(":")[0], numbers_of(method, options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(options.device)
    data = {"calibration_data": [{"input_ids": part} for part in rows.split(windows)]} if algorithm in OURS[2:] else {}
    started = time.perf_counter()
    quantize_model_ptq(
        model,
        quantization_bits=4,
        quantization_type="weight_only",
        group_size=options.group_size,
        embedding_bits=16,
        algorithm=algorithm,
        iterations=iterations,
        progress=not options.smoke,
        **data,
    )
    seconds = time.perf_counter() - started
    dequantize_model(model).save_pretrained(out)
    return {"package": f"hfquant {version('hfquant')}", "threads": torch.get_num_threads(), "seconds": seconds}


def peer_model(
    source: Path, method: str, python: str, rows: torch.Tensor, options: argparse.Namespace, out: Path
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        save_file({"input_ids": rows}, tokens)
        command = [python, str(Path(__file__).with_name("ptq_peers.py")), method.partition(":")[0]]
        command += ["--model", str(source), "--tokens", str(tokens), "--out", str(out)]
        command += ["--iters", str(numbers_of(method, options)[0]), "--group-size", str(options.group_size)]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((out / "peer.json").read_text())
    return found


def make_models(
    source: Path, calibration: torch.Tensor, options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Any]]:
    """What is recorded of each method, whose model then lies in ``folder``."""
    records = {}
    peers = dict(given.split("=", 1) for given in options.peer)
    for method in [*options.ours, *peers]:
        out = folder / method.replace(":", "-")
        record = out / "record.json"
        if not record.is_file():
            out.mkdir(parents=True, exist_ok=True)
            if method in peers:
                made = peer_model(source, method, peers[method], calibration, options, out)
            else:
                made = our_model(source, method, calibration, options, out)
            record.write_text(json.dumps(made))
        records[method] = json.loads(record.read_text())
    return records


def rows_of(
    source: Path, texts: dict[str, torch.Tensor], records: dict[str, dict], folder: Path, options: argparse.Namespace
) -> list[dict]:
    """One row a method and text, all compared with the float model in one pass."""
    models = {
        method: AutoModelForCausalLM.from_pretrained(folder / method.replace(":", "-"), dtype=torch.float32).to(
            options.device
        )
        for method in records
    }
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(options.device)
    rows = []
    for text, ids in texts.items():
        found = compare_models(original, models, ids, context=options.context, progress=not options.smoke)
        for method, result in found.items():
            increase = 100 * (result.perplexity / result.reference_perplexity - 1)
            measured = {"perplexity": result.perplexity, "increase_percent": increase, "mean_kl": result.mean_kl}
            measured |= {"top1_percent": 100 * result.top1_agreement, "tokens": len(ids)}
            measured["reference_perplexity"] = result.reference_perplexity
            rows.append({"text": text, "method": method} | measured | records[method])
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
    parser.add_argument("--ours", nargs="*", default=list(OURS), metavar="ALGORITHM[:ITERATIONS[:WINDOWS]]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[:ITERATIONS]=PYTHON")
    parser.add_argument("--second-text", action="store_true", help="also the help topics of Python")
    parser.add_argument("--keep", type=Path, help="where the models stay")
    parser.add_argument("--only-make", action="store_true", help="make the models and measure another time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    return parser.parse_args(given)


def windows_of(ids: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    whole = ids[: len(ids) // options.context * options.context].view(-1, options.context)
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[: options.samples]
    return whole[chosen.sort().values]


def smoke_rows(options: argparse.Namespace, folder: Path) -> list[dict]:
    options.context, options.samples, options.iterations, options.group_size = 16, 4, 2, 32
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = folder / "float"
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(source)
    ids = torch.arange(256) * 7 % 250
    records = make_models(source, windows_of(ids, options), options, folder)
    return rows_of(source, {"smoke": ids[:64]}, records, folder, options)


def real_rows(options: argparse.Namespace, folder: Path) -> list[dict]:
    from demo_models import fetch_smollm2

    from hfquant.cli.text import default_text

    source = options.model or fetch_smollm2()[0]
    text = options.text.read_text(encoding="utf-8") if options.text else default_text()
    cut = int(len(text) * CALIBRATION_SHARE)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [text[:cut], text[cut:], *([default_text()] if options.second_text else [])]
    calibration, *judged = (tokenizer(t, return_tensors="pt", verbose=False)["input_ids"][0] for t in texts)
    names = ("last 30 % of the text", "help topics of Python")
    measured = {name: ids[: options.tokens or None] for name, ids in zip(names, judged, strict=False)}
    records = make_models(source, windows_of(calibration, options), options, folder)
    return [] if options.only_make else rows_of(source, measured, records, folder, options)


def main(given: list[str] | None = None) -> dict[str, Any]:
    from quality import finish, machine

    options = arguments(given)
    results: dict[str, Any] = machine(options.device) | {
        "command": "python benchmarks/ptq.py " + " ".join(given or sys.argv[1:])
    }
    results |= {"calibration_windows": options.samples, "window": options.context}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        results["rows"] = smoke_rows(options, folder) if options.smoke else real_rows(options, folder)
    return finish(results, options.json)


if __name__ == "__main__":
    main()

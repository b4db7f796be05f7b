"""Size and quality of every scheme on two real models, measured from the saved files.

    python benchmarks/quality.py --text wikitext2-valid.txt --sts stsb-dev.csv --sts-calibration stsb-train.csv

The language model is judged on the last 30 % of --text (default: the help topics of Python), the encoder by Spearman's
correlation on --sts, a CSV of sentence, sentence, score. Models: those of the demos, or --model and --encoder.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hfquant
from hfquant import dequantize_model, get_quantization_info, quantize_model_ptq
from hfquant.cli.text import default_text
from hfquant.evaluation.compare import compare_models, sentence_similarity, spearman
from hfquant.hf.info import activation_shares


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).with_name("results")

INT4 = {"quantization_bits": 4, "quantization_type": "weight_only"}
INT8 = {"quantization_bits": 8}
STATIC = INT8 | {"quantization_type": "static"}
OBSERVERS = ("minmax", "percentile", "mse")
SCHEMES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "INT8 weight-only": (INT8 | {"quantization_type": "weight_only"}, (16, 8, 4)),
    "INT8 dynamic": (INT8 | {"quantization_type": "dynamic"}, (8,)),
    "INT8 dynamic, symmetric": (INT8 | {"quantization_type": "dynamic", "activation_symmetric": True}, (8,)),
    "INT8 dynamic, calibrated": (INT8 | {"quantization_type": "dynamic", "algorithm": "gptq"}, (8,)),
    **{f"INT8 static, {name}": (STATIC | {"activation_observer": name}, (8,)) for name in OBSERVERS},
    "INT4 g64 absmax": (INT4 | {"group_size": 64, "algorithm": "rtn"}, (8,)),
    "INT4 g64 search": (INT4 | {"group_size": 64}, (16, 8, 4)),
    "INT4 g32 absmax": (INT4 | {"group_size": 32, "algorithm": "rtn"}, (8,)),
    "INT4 g32 search": (INT4 | {"group_size": 32}, (8, 4)),
}
LANGUAGE: dict[str, dict[str, Any]] = {
    f"{name}, embeddings {bits}": fields | {"embedding_bits": bits}
    for name, (fields, embeddings) in SCHEMES.items()
    for bits in embeddings
}
ENCODER: dict[str, dict[str, Any]] = {
    "INT8 weight-only": INT8 | {"quantization_type": "weight_only"},
    "INT8 dynamic": INT8 | {"quantization_type": "dynamic"},
    "INT8 dynamic, symmetric": INT8 | {"quantization_type": "dynamic", "activation_symmetric": True},
    **{f"INT8 static, {name}": STATIC | {"activation_observer": name} for name in OBSERVERS},
    "INT4 g32": INT4 | {"group_size": 32},
    "INT4 g32, embeddings 4": INT4 | {"group_size": 32, "embedding_bits": 4},
}
CALIBRATION_SENTENCES = 128
CALIBRATION_WINDOWS = 32
"""Windows of 512 tokens, from the part of the text that is not judged."""


def machine(device: str = "cpu") -> dict[str, str]:
    described = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "machine": described if device == "cpu" else f"{described}, {torch.cuda.get_device_name(device)}",
        "versions": f"hfquant {hfquant.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "command": "python benchmarks/quality.py " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def language_rows(
    source: Path, ids: torch.Tensor, calibration: torch.Tensor, schemes: dict[str, dict[str, Any]], context: int
) -> list[dict]:
    """One row a scheme: all are saved, loaded from their files, and run over the same windows beside the original."""
    windows = [{"input_ids": window.unsqueeze(0)} for window in calibration.split(context)[:CALIBRATION_WINDOWS]]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original.save_pretrained(folder / "float32")
        whole = file_bytes(folder / "float32")
        models, rows = {}, {}
        for number, (name, fields) in enumerate(schemes.items()):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            calibrated = fields.get("algorithm") == "gptq" or fields["quantization_type"] == "static"
            data = windows if calibrated else None
            quantize_model_ptq(model, progress=False, calibration_data=data, **fields)
            bits, static = get_quantization_info(model).bits_per_weight, activation_shares(model)["static"]
            model.save_pretrained(folder / str(number))
            models[name] = AutoModelForCausalLM.from_pretrained(folder / str(number))
            if fields["quantization_type"] == "weight_only":
                dequantize_model(models[name])  # the same values (tests/hf/test_dequantize.py), for all in one way
            size = file_bytes(folder / str(number))
            rows[name] = {"scheme": name, "MB": size / 1e6, "smaller": whole / size, "bits_per_weight": bits}
            rows[name] |= {"static_percent": 100 * static} if static else {}
        compared = compare_models(original, models, ids, context=context)
    first = next(iter(compared.values()))
    result = [{"scheme": "float32", "MB": whole / 1e6, "smaller": 1.0, "perplexity": first.reference_perplexity}]
    for name, row in rows.items():
        found = compared[name]
        increase = 100 * (found.perplexity / found.reference_perplexity - 1)
        measured = {"perplexity": found.perplexity, "increase_percent": increase, "mean_kl": found.mean_kl}
        result.append(row | measured | {"top1_percent": 100 * found.top1_agreement})
    return result


def encoder_rows(
    source: Path,
    pairs: list[tuple[str, str]],
    scores: torch.Tensor,
    sentences: list[str],
    schemes: dict[str, dict[str, Any]],
) -> list[dict]:
    """One row a scheme: Spearman's correlation x 100 of the model loaded from its saved file."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModel.from_pretrained(source, dtype=torch.float32)
    batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in sentences[:CALIBRATION_SENTENCES]]
    baseline = 100 * spearman(sentence_similarity(original, tokenizer, pairs), scores)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original.save_pretrained(folder / "float32")
        whole = file_bytes(folder / "float32")
        rows = [{"scheme": "float32", "MB": whole / 1e6, "smaller": 1.0, "spearman": baseline}]
        for number, (name, fields) in enumerate(schemes.items()):
            data = batches if fields["quantization_type"] == "static" else None
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
            quantize_model_ptq(model, progress=False, calibration_data=data, **fields)
            model.save_pretrained(folder / str(number))
            loaded = AutoModel.from_pretrained(folder / str(number))
            value = 100 * spearman(sentence_similarity(loaded, tokenizer, pairs), scores)
            size = file_bytes(folder / str(number))
            row = {"scheme": name, "MB": size / 1e6, "smaller": whole / size}
            static = activation_shares(loaded)["static"]
            row |= {"static_percent": 100 * static} if static else {}
            rows.append(row | {"spearman": value, "difference": value - baseline})
    return rows


def table(rows: list[dict]) -> str:
    """A Markdown table of ``rows``; missing values stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1
        else (f"{value:.2f}" if isinstance(value, float) else str(value))
    )


def finish(results: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Print the results of a benchmark, and write them to ``file`` if there is one."""
    for key, value in results.items():
        print("\n" + table(value) if isinstance(value, list) else f"{key}: {value}")
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def read_pairs(file: Path) -> tuple[list[tuple[str, str]], torch.Tensor]:
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.reader(stream) if len(row) >= 3]
    return [(row[0], row[1]) for row in rows], torch.tensor([float(row[2]) for row in rows])


def split_text(text: str, judged: float = 0.3) -> tuple[str, str]:
    """What to calibrate on, and the last share, which is judged."""
    cut = int(len(text) * (1 - judged))
    return text[:cut], text[cut:]


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--text", type=Path, help="UTF-8 text; judged on its last 30 %%")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens at most; 0 takes all")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--only", default="", help="schemes whose name contains this")
    parser.add_argument("--sts", type=Path, help="CSV of sentence, sentence, score")
    parser.add_argument("--sts-calibration", type=Path, help="the same, to calibrate static activations on")
    parser.add_argument("--encoder-only", action="store_true", help="leave the language model out")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    return parser.parse_args(given)


def smoke() -> list[dict]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        return language_rows(Path(folder), torch.arange(64) % 250, torch.arange(128) % 250, LANGUAGE, 32)


def language(options: argparse.Namespace) -> dict[str, Any]:
    from demo_models import fetch_smollm2

    source = options.model or fetch_smollm2()[0]
    text = options.text.read_text(encoding="utf-8") if options.text else default_text()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration, ids = (
        tokenizer(part, return_tensors="pt", verbose=False)["input_ids"][0] for part in split_text(text)
    )
    ids = ids[: options.tokens or ids.numel()]
    schemes = {name: fields for name, fields in LANGUAGE.items() if options.only in name}
    return {"tokens": ids.numel(), "language": language_rows(source, ids, calibration, schemes, options.context)}


def encoder(options: argparse.Namespace) -> dict[str, Any]:
    from demo_models import fetch_minilm

    pairs, scores = read_pairs(options.sts)
    calibration = read_pairs(options.sts_calibration or options.sts)[0]
    sentences = [sentence for pair in calibration for sentence in pair]
    schemes = {name: fields for name, fields in ENCODER.items() if options.only in name}
    return {"encoder": encoder_rows(options.encoder or fetch_minilm()[0], pairs, scores, sentences, schemes)}


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(given)
    torch.manual_seed(0)
    results: dict[str, Any] = machine()
    if options.smoke:
        results["language"] = smoke()
    if not options.smoke and not options.encoder_only:
        results |= language(options)
    if not options.smoke and options.sts:
        results |= encoder(options)
    return finish(results, options.json)


if __name__ == "__main__":
    main()

"""Bits by budget beside one scheme for all layers, at equal size, with the same algorithm and calibration data.

    python benchmarks/allocate.py --text wikitext2-valid.txt --sts stsb-dev.csv --sts-calibration stsb-train.csv

SmolLM2-135M: calibrated on the first 70 % of --text, judged on its last 30 % (perplexity, mean KL, top-1 agreement).
MiniLM: calibrated on sentences of --sts-calibration, judged by Spearman on --sts. Embeddings have 8 bits, all
schemes are symmetric. The uniform arm has groups of 32, which is 4.5 bits a weight; the others get target_bits=4.5.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfquant import get_quantization_info, quantize_model_ptq
from hfquant.evaluation.compare import compare_models, sentence_similarity, spearman


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

UNIFORM = {"quantization_bits": 4, "quantization_type": "weight_only", "group_size": 32}
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "uniform g32, search": (UNIFORM | {"algorithm": "search"}, False),
    "target_bits=4.5, search, no data": ({"target_bits": 4.5, "algorithm": "search"}, False),
    "target_bits=4.5, search": ({"target_bits": 4.5, "algorithm": "search"}, True),
    "uniform g32, gptq": (UNIFORM | {"algorithm": "gptq"}, True),
    "target_bits=4.5, gptq": ({"target_bits": 4.5, "algorithm": "gptq"}, True),
}
"""Arm -> fields of the config, and whether it gets the calibration data."""


def made(model: Any, fields: dict[str, Any], batches: list[Any] | None, quiet: bool) -> dict[str, Any]:
    started = time.perf_counter()
    quantize_model_ptq(model, calibration_data=batches, progress=not quiet, **fields)
    seconds = time.perf_counter() - started
    info = get_quantization_info(model)
    chosen = [q for q in info.quantized if "embed" not in q.name and "lm_head" not in q.name]
    schemes: dict[str, int] = {}
    for parameter in chosen:
        schemes[parameter.scheme] = schemes.get(parameter.scheme, 0) + 1
    bits = 8 * sum(q.bytes_after for q in chosen) / sum(q.numel for q in chosen)
    listed = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(schemes.items()))
    return {"bits": bits, "MB": info.bytes_after / 1e6, "seconds": seconds, "schemes": listed}


def language_rows(
    source: Path, batches: list[Any], ids: torch.Tensor, arms: dict[str, Any], context: int, quiet: bool
) -> list[dict]:
    rows, models = {}, {}
    for arm, (fields, calibrated) in arms.items():
        models[arm] = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        rows[arm] = made(models[arm], fields, batches if calibrated else None, quiet)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = compare_models(original, models, ids, context=context, progress=not quiet)
    return [
        {
            "arm": arm,
            "perplexity": found[arm].perplexity,
            "reference": found[arm].reference_perplexity,
            "mean_kl": found[arm].mean_kl,
            "top1_percent": 100 * found[arm].top1_agreement,
        }
        | rows[arm]
        for arm in arms
    ]


def encoder_rows(
    source: Path, batches: list[Any], pairs: Any, scores: torch.Tensor, arms: dict[str, Any]
) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModel.from_pretrained(source, dtype=torch.float32)
    baseline = 100 * spearman(sentence_similarity(original, tokenizer, pairs), scores)
    rows = [{"arm": "float32", "spearman": baseline}]
    for arm, (fields, calibrated) in arms.items():
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
        row = made(model, fields, batches if calibrated else None, quiet=True)
        value = 100 * spearman(sentence_similarity(model, tokenizer, pairs), scores)
        rows.append({"arm": arm, "spearman": value, "difference": value - baseline} | row)
    return rows


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to measure on; 0 takes all")
    parser.add_argument("--sts", type=Path, help="CSV of sentence, sentence, score")
    parser.add_argument("--sts-calibration", type=Path, help="the same, to calibrate on")
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    return parser.parse_args(given)


def smoke_rows() -> list[dict]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
        ids = torch.arange(256) * 7 % 250
        batches = [{"input_ids": part.unsqueeze(0)} for part in ids.split(16)]
        return language_rows(Path(folder), batches, ids[:64], ARMS, 16, quiet=True)


def main(given: list[str] | None = None) -> dict[str, Any]:
    from ptq import CALIBRATION_SHARE
    from quality import finish, machine, read_pairs

    options = arguments(given)
    results: dict[str, Any] = machine() | {"command": "python benchmarks/allocate.py " + " ".join(sys.argv[1:])}
    arms = {name: arm for name, arm in ARMS.items() if options.only in name}
    if options.smoke:
        results["language"] = smoke_rows()
    if options.text:
        from demo_models import fetch_smollm2

        source = fetch_smollm2()[0]
        tokenizer, text = AutoTokenizer.from_pretrained(source), options.text.read_text(encoding="utf-8")
        cut = int(len(text) * CALIBRATION_SHARE)
        calibration, ids = (
            tokenizer(part, return_tensors="pt", verbose=False)["input_ids"][0] for part in (text[:cut], text[cut:])
        )
        whole = calibration[: len(calibration) // 512 * 512].view(-1, 512)
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[: options.samples]
        batches = [{"input_ids": part} for part in whole[chosen.sort().values].split(4)]
        results["language"] = language_rows(source, batches, ids[: options.tokens or None], arms, 512, quiet=False)
    if options.sts:
        from demo_models import fetch_minilm

        source = fetch_minilm()[0]
        tokenizer = AutoTokenizer.from_pretrained(source)
        sentences = [s for pair in read_pairs(options.sts_calibration or options.sts)[0] for s in pair][:256]
        batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in sentences]
        results["encoder"] = encoder_rows(source, batches, *read_pairs(options.sts), arms)
    return finish(results, options.json)


if __name__ == "__main__":
    main()

"""Other packages' INT4 on the same model and the same tokens; run by benchmarks/ptq.py in their own environments.

    PEER_PYTHON benchmarks/ptq_peers.py auto-round --model DIR --tokens ids.safetensors --out DIR --iters 50

Writes a float model whose linear layers hold the values of the peer's grid, and ``peer.json`` with versions, seconds
and peak memory, so that one program judges all results alike.
"""

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def auto_round(options: argparse.Namespace) -> str:
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = load_file(options.tokens)["input_ids"]
    rows = [
        {"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, row.numel(), dtype=torch.int64)} for row in ids
    ]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(options.model),
        scheme="W4A16",
        group_size=options.group_size,
        sym=True,
        iters=options.iters,
        nsamples=len(rows),
        seqlen=ids.shape[1],
        batch_size=4,
        dataset=rows,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    )
    rounder.quantize_and_save(options.out, format="fake")
    for made in list(options.out.glob("*-w*g*/*")):  # it makes a folder of its own
        made.rename(options.out / made.name)
    return f"auto-round {version('auto-round')}"


def llm_compressor(options: argparse.Namespace) -> str:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = load_file(options.tokens)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    arguments = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=options.group_size,
        observer=options.observer,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=0.01)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale"):
                from compressed_tensors.quantization import fake_quantize

                zero = getattr(module, "weight_zero_point", None)
                index = getattr(module, "weight_g_idx", None)
                values = fake_quantize(
                    module.weight, module.weight_scale, zero, module.quantization_scheme.weights, index
                )
                module.weight.copy_(values)
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    weights = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights)
    plain.save_pretrained(options.out)
    return f"llm-compressor {version('llmcompressor')}"


def nf4(options: argparse.Namespace) -> str:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        codes, state = quantize_4bit(weight, blocksize=options.group_size, quant_type="nf4")
        return dequantize_4bit(codes, state)

    _round_linears(options, round_trip)
    return f"bitsandbytes {version('bitsandbytes')}"


def hqq(options: argparse.Namespace) -> str:
    from hqq.core.quantize import Quantizer

    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        codes, meta = Quantizer.quantize(
            weight,
            nbits=4,
            group_size=options.group_size,
            optimize=True,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        return Quantizer.dequantize(codes, meta)

    _round_linears(options, round_trip)
    return f"hqq {version('hqq')}"


def _round_linears(options: argparse.Namespace, round_trip: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(round_trip(module.weight.clone()))
    model.save_pretrained(options.out)


PEERS = {"auto-round": auto_round, "llm-compressor": llm_compressor, "nf4": nf4, "hqq": hqq}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with input_ids [B, T]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--observer", default="memoryless_minmax")
    options = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    package = PEERS[options.peer](options)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {"package": package, "torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": seconds}
    (options.out / "peer.json").write_text(json.dumps(record | {"peak_mib": peak}))


if __name__ == "__main__":
    main()

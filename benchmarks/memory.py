"""Peak memory and time of ``hfquant quantize`` beside what ``hfquant plan`` said, on random Llamas and on SmolLM2.

    python benchmarks/memory.py 7b --folder DIR                    # sharded bfloat16 to INT4 without calibration data
    python benchmarks/memory.py 1b --folder DIR --windows 16       # to INT4 with calibration data
    python benchmarks/memory.py 1b --folder DIR --kills 2          # killed (SIGKILL) on the way, and compared
    python benchmarks/memory.py smollm2 --windows 64 --text FILE   # a real model; --algorithm signround --iterations 50

DIR needs room for the checkpoint (13.5 GB and 2.5 GB) and twice its quarter; it is emptied in the end. Anonymous memory
is what the process itself holds. File-backed memory are pages of weight files, mapped, which the system drops when
memory is short; both are polled from /proc (Linux only).
"""

import argparse
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfquant.cli.text import default_text
from hfquant.formats.headers import DTYPE_BYTES, read_header
from hfquant.formats.shards import file_sha256


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
HFQUANT = (sys.executable, "-c", "from hfquant.cli.main import main; main()")
SHARD_BYTES = 2_000_000_000
POOL = 1 << 26
"""Random numbers that all weights are cut from: drawing billions would take longer than quantizing them."""


def make_checkpoint(shape: str, folder: Path) -> int:
    """Write a random sharded bfloat16 Llama and a tokenizer; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {n: p.shape for n, p in model.named_parameters()}  # tied parameters stand once
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Size]] = [{}]
    for name, size in shapes.items():
        if sum(s.numel() for s in shards[-1].values()) * 2 + size.numel() * 2 > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = size
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({n: _values(n, s, pool) for n, s in shard.items()}, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    total = 2 * sum(size.numel() for size in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
    return total


def _values(name: str, size: torch.Size, pool: torch.Tensor) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    shift = random.Random(name).randrange(POOL)
    repeated = pool.roll(shift).repeat(-(-size.numel() // POOL))
    return repeated[: size.numel()].view(size)


def _tokenizer(limit: int) -> PreTrainedTokenizerFast:
    words = sorted(set(default_text().split()))[: min(limit, 30_000) - 1]
    vocabulary = {"<unk>": 0} | {word: number for number, word in enumerate(words, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def settings(options: argparse.Namespace) -> list[str]:
    """What the plan and the run are given alike."""
    fields = {"quantization_bits": 4, "algorithm": options.algorithm, "iterations": options.iterations}
    file = options.folder / "config.json"
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return ["--config", str(file)]


def plan(source: Path, options: argparse.Namespace) -> dict[str, float]:
    """What ``hfquant plan`` says."""
    command = [*HFQUANT, "plan", str(source), *settings(options), "--json"]
    if options.windows:
        command += ["--calibrated", "--calibration-batches", str(options.windows)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    sizes = {"planned bytes": found["bytes_after"], "planned peak GB": found["peak_memory"] / 1e9}
    return sizes | {"planned seconds": found["seconds"]}


def quantize(source: Path, out: Path, options: argparse.Namespace, kill_after: float | None = None) -> dict[str, Any]:
    """Run the command, and watch its memory; with ``kill_after`` seconds it is killed then."""
    command = [*HFQUANT, "quantize", str(source), "-o", str(out), *settings(options), "--json"]
    if options.windows:
        text = options.folder / "calibration.txt"
        text.write_text(options.text.read_text(encoding="utf-8") if options.text else default_text(), encoding="utf-8")
        command += ["--calibration", str(text), "--calibration-batches", str(options.windows)]
    started, peaks = time.perf_counter(), {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for key, size in _memory(process.pid).items():
                peaks[key] = max(peaks[key], size)
            if kill_after is not None and time.perf_counter() - started > kill_after:
                process.send_signal(signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    over.set()
    watcher.join()
    seconds = time.perf_counter() - started
    if process.returncode and kill_after is None:
        raise RuntimeError(f"hfquant quantize ended with {process.returncode}")
    tensors = [tensor for file in out.glob("*.safetensors") for tensor in read_header(file).tensors.values()]
    stored = sum(DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in tensors)
    found = {"seconds": seconds, "finished": process.returncode == 0, "bytes": stored}
    return found | {f"peak {key} GB": size / 1e9 for key, size in peaks.items()} | _figures(output)


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    wanted = ("RssAnon", "RssFile", "VmRSS")
    return {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(wanted)}


def _figures(output: bytes) -> dict[str, Any]:
    if not output.strip():
        return {}
    summary = json.loads(output)
    return {"GB": summary["file_bytes"] / 1e9, "bits per weight": summary["bits_per_quantized_weight"]}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in folder.glob("*.safetensors")}


def rows(options: argparse.Namespace, folder: Path) -> list[dict]:
    if options.shape in SHAPES:
        source = folder / "float"
        size = make_checkpoint(options.shape, source)
    else:
        from demo_models import fetch_smollm2

        source = fetch_smollm2()[0]
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    planned = plan(source, options)
    whole = quantize(source, folder / "whole", options)
    found = [{"run": "uninterrupted", "float GB": size / 1e9} | planned | whole]
    chance = random.Random(0)
    for _ in range(options.kills):
        moment = chance.uniform(0.1, 0.9) * whole["seconds"]
        killed = quantize(source, folder / "killed", options, kill_after=moment)
        found.append({"run": f"killed after {moment:.0f} s", "float GB": size / 1e9} | killed)
    if options.kills:
        if not (folder / "killed").is_dir():
            found.append({"run": "went on", "float GB": size / 1e9} | quantize(source, folder / "killed", options))
        found[-1]["same bytes"] = digests(folder / "whole") == digests(folder / "killed")
    return found


def main(given: list[str] | None = None) -> dict[str, Any]:
    from quality import finish, machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES, "smollm2"])
    parser.add_argument("--folder", type=Path, help="where files go; must not exist, and is removed")
    parser.add_argument("--windows", type=int, default=0, help="calibration windows of 512 tokens; 0: no calibration")
    parser.add_argument("--text", type=Path, help="to calibrate on; default: the help topics of Python")
    parser.add_argument("--algorithm", help="default: gptq with calibration, search without")
    parser.add_argument("--iterations", type=int, help="of signround")
    parser.add_argument("--kills", type=int, default=0, help="kill a second run so often, let it finish, compare")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=options.folder is None, parents=True)
    options.folder = folder
    try:
        results = machine() | {"command": "python benchmarks/memory.py " + " ".join(given or sys.argv[1:])}
        results |= {"rows": rows(options, folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return finish(results, options.json)


if __name__ == "__main__":
    main()

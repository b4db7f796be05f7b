"""Fine-tuning quantized models against LoRA in float, QLoRA and LoRA that is quantized afterwards, on two real models.

    python benchmarks/finetune.py classification --positive rt-polarity.pos --negative rt-polarity.neg
    python benchmarks/finetune.py language --text wikitext2-valid.txt

Every finished arm of a seed is one JSON file in --results; one that has its file is not repeated, so the command can be
interrupted and given again. The rows and the paired comparisons are written to --json. --bf16 trains by autocast to
bfloat16. --device cuda trains on a GPU (with products in TF32), --jobs 8 lets eight arms share it.

classification  MiniLM on sentence polarity (Pang and Lee 2005), one split for all: 70 % to train, 10 % to tune, 20 % to
                judge, drawn with seed 0. The head (pooler, and a new classifier) trains in every arm.
language        SmolLM2-135M learns the first 60 % of the text; tuned on the next 10 %, judged on the last 30 %.

Every arm trains as many steps of the same batches, and tries as many learning rates, with the first seed, on the part
to tune; what was trained is kept in a file, so the best rate's model is not trained again to be judged on the part to
test. Quantized models are INT4 symmetric g64 with embeddings and head in float, as bitsandbytes' NF4 has them, and are
calibrated on the part to train, with --ptq-algorithm (GPTQ).

head         the head alone (classification)
lora         LoRA on the float model
lora, ptq    that, merged, then quantized with --ptq-algorithm; lora-signround with SignRound
nf4          LoRA on bitsandbytes' NF4, and merged by PEFT
grid         hfquant's adapter inside the rounding, merged, saved and loaded again
grid-delay   the same without rounding for the first half of the steps, then rounded anew with --ptq-algorithm; what it
             has then is kept in a file too: up to there nothing depends on the learning rate of scales. From there on
             adapters are at rest, scales train, and --distillation of the loss is the divergence from the model before
             the rounding. Each half has a learning rate schedule of its own
scales       hfquant's scales, norms and biases alone
side         LoRA beside hfquant's codes, and merged onto the grid
"""

import argparse
import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
)

from hfquant import quantize_model_ptq
from hfquant.evaluation.perplexity import perplexity
from hfquant.hf.peft import add_side_adapter, merge_side_adapter
from hfquant.nn.swap import packed_modules
from hfquant.numerics.packing import unpack
from hfquant.qat.distill import distillation_loss


HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

SCHEME = {"quantization_bits": 4, "quantization_type": "weight_only", "group_size": 64, "embedding_bits": 16}
RANK = 16

DELAY = 0.5
"""Share of the steps for which "grid-delay" trains without rounding."""

ARMS = ("head", "lora", "lora-signround", "nf4", "side", "scales", "grid", "grid-delay")
ADAPTER_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
Rate = float | tuple[float, float] | list[float]
RATES: dict[str, tuple[Rate, ...]] = dict.fromkeys(("lora", "nf4", "side", "grid"), ADAPTER_RATES) | {
    "grid-delay": ((4e-3, 2e-3), (2e-3, 1e-3), (2e-3, 2e-3), (2e-3, 4e-3)),
    "head": (3e-4, 1e-3, 3e-3, 1e-2),
    "scales": tuple((rate, rate) for rate in (3e-2, 1e-3, 3e-3, 1e-2)),
    "lora-signround": (0.0,),
}
"""Learning rates that are tried, of adapters and of the head beside them, or of these and the logarithm of scales; the
language model takes the last three."""
HEADS = ("classifier", "pooler")
"""Of an encoder: float, and trained in every arm."""


# The arms.


def prepared(model: nn.Module, arm: str, seed: int) -> nn.Module:
    """``model``, float or quantized as ``arm`` wants it, with what the arm trains."""
    torch.manual_seed(1000 + seed)
    if arm == "head":
        return model
    if arm in ("lora", "nf4"):
        from peft import LoraConfig, get_peft_model

        names = [name for name, module in model.named_modules() if is_adapted(name, module)]
        task = "SEQ_CLS" if hasattr(model, "classifier") else "CAUSAL_LM"
        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type=task))
    if arm == "side":
        return add_side_adapter(model, rank=RANK)
    from hfquant import prepare_model_for_finetuning

    return prepare_model_for_finetuning(model, adapter=arm.removesuffix("-delay"), rank=RANK, progress=False)


def is_adapted(name: str, module: nn.Module) -> bool:
    """The linear layers that the quantized arms adapt too: all but heads."""
    return isinstance(module, nn.Linear) and not set(name.split(".")) & {"lm_head", *HEADS}


def freeze(model: nn.Module, arm: str) -> nn.Module:
    """Let the head train in every arm, and nothing else where the arm is the head alone."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        in_head = any(head in parts for head in HEADS) and "original_module" not in parts
        if arm == "head" or in_head:
            parameter.requires_grad_(in_head)
    return model


def merged(model: nn.Module, arm: str, folder: Path) -> nn.Module:
    """The model that is shipped: no adapter left, and saved and loaded again where hfquant made it."""
    if arm in ("lora", "nf4"):
        return model.merge_and_unload()
    if arm == "side":
        model = merge_side_adapter(model)
    elif arm in ("grid", "grid-delay", "scales"):
        from hfquant import merge_adapters

        model = merge_adapters(model)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    return loaded.to(model.device).eval()


def changed_codes(base: nn.Module, model: nn.Module) -> float:
    """Share of the codes of ``base`` that are others in ``model``."""
    before, changed, total = dict(packed_modules(base)), 0, 0
    for name, module in packed_modules(model):
        bits, inputs = module.scheme.weight.bits, module.float_weights["weight"].in_features
        codes = [unpack(m.packed().weight, bits=bits, length=inputs) for m in (before[name], module)]
        changed, total = changed + int((codes[0] != codes[1]).sum()), total + codes[0].numel()
    return changed / total if total else 0.0


# The tasks: what is trained on, and how a model is judged.


class Task:
    """One model and its data.

    Attributes:
        source: Folder of the float model.
        measure: Name of what is judged.
        sign: 1 if less of it is better, else -1.
    """

    source: Path
    options: argparse.Namespace
    measure: str
    sign: int

    def float_model(self, seed: int) -> nn.Module:
        raise NotImplementedError

    def calibration(self) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    def results(self, model: nn.Module, seed: int, skip: int, teacher: nn.Module | None) -> Iterator[tuple]:
        """Logits, labels and the teacher's logits of the batches in their order, without the first ``skip``."""
        raise NotImplementedError

    def losses(
        self, model: nn.Module, seed: int, skip: int = 0, teacher: nn.Module | None = None, share: float = 0.0
    ) -> Iterator[Tensor]:
        """Cross-entropy, with a ``share`` of the divergence from the teacher if there is one."""
        for logits, labels, theirs in self.results(model, seed, skip, teacher):
            loss = cross_entropy(logits, labels)
            if theirs is not None:
                total, count = distillation_loss(logits, theirs, None, temperature=1.0)
                loss = (1 - share) * loss + share * total / count
            yield loss

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Of a batch to train on."""
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.options.bf16):
            return model(**inputs).logits.float()

    @torch.no_grad()
    def targets(self, teacher: nn.Module | None, inputs: Mapping[str, Tensor]) -> Tensor | None:
        return None if teacher is None else self.logits(teacher, inputs)

    def judge(self, model: nn.Module, part: str) -> dict[str, Any]:
        raise NotImplementedError


class Classification(Task):
    """Polarity of sentences with a sentence encoder."""

    measure, sign = "accuracy", -1

    def __init__(self, options: argparse.Namespace) -> None:
        from demo_models import fetch_minilm

        self.source = options.encoder or fetch_minilm()[0]
        self.options, self.batch = options, options.batch
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        sides = [
            file.read_text(encoding="latin-1").rstrip("\n").split("\n") for file in (options.negative, options.positive)
        ]
        sentences, labels = sides[0] + sides[1], [0] * len(sides[0]) + [1] * len(sides[1])
        ids = tokenizer(sentences, truncation=True, max_length=64)["input_ids"]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
        ends = [0, int(0.7 * len(ids)), int(0.8 * len(ids)), len(ids)]
        self.parts = {
            name: [(ids[i], labels[i]) for i in order[start:end]]
            for name, start, end in zip(("train", "tune", "test"), ends[:-1], ends[1:], strict=True)
        }

    def float_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(self.source, dtype=torch.float32)

    def calibration(self) -> list[dict[str, Tensor]]:
        return [dict(batched([ids])) for ids, _ in self.parts["train"][:128]]

    def results(self, model: nn.Module, seed: int, skip: int, teacher: nn.Module | None) -> Iterator[tuple]:
        for rows in itertools.islice(self.batches(seed), skip, None):
            labels = torch.tensor([label for _, label in rows], device=model.device)
            inputs = batched([ids for ids, _ in rows]).to(model.device)
            yield self.logits(model, inputs), labels, self.targets(teacher, inputs)

    def batches(self, seed: int) -> Iterator[list[tuple[list[int], int]]]:
        """Batches of sentences of like length, in random order."""
        data, generator = self.parts["train"], torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data), generator=generator).tolist()
            pools = [
                sorted(order[i : i + 16 * self.batch], key=lambda j: len(data[j][0]))
                for i in range(0, len(order), 16 * self.batch)
            ]
            batches = [pool[i : i + self.batch] for pool in pools for i in range(0, len(pool), self.batch)]
            for chosen in torch.randperm(len(batches), generator=generator).tolist():
                yield [data[j] for j in batches[chosen]]

    @torch.no_grad()
    def judge(self, model: nn.Module, part: str) -> dict[str, Any]:
        """Accuracy in percent, and which sentences were right."""
        data = self.parts[part]
        right = [False] * len(data)
        order = sorted(range(len(data)), key=lambda i: len(data[i][0]))
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32]
            guesses = model(**batched([data[i][0] for i in chosen]).to(model.device)).logits.argmax(-1).tolist()
            for i, guess in zip(chosen, guesses, strict=True):
                right[i] = guess == data[i][1]
        return {"accuracy": 100 * sum(right) / len(right), "right": "".join("01"[value] for value in right)}


def batched(rows: list[list[int]]) -> BatchEncoding:
    """Padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return BatchEncoding({"input_ids": ids, "attention_mask": (torch.arange(width) < lengths).long()})


class Language(Task):
    """The next token of a text."""

    measure, sign = "perplexity", 1

    def __init__(self, options: argparse.Namespace) -> None:
        from qat import language_source, split_ids

        self.source = language_source(options)
        self.options, self.parts = options, split_ids(options, self.source)
        self.parts["tune"] = self.parts["tune"][: options.tune_tokens]

    def float_model(self, seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)

    def calibration(self) -> list[dict[str, Tensor]]:
        from qat import calibration_windows

        return calibration_windows(self.parts["train"])

    def results(self, model: nn.Module, seed: int, skip: int, teacher: nn.Module | None) -> Iterator[tuple]:
        from qat import language_batches

        for batch in itertools.islice(language_batches(self.parts["train"], self.options, seed), skip, None):
            theirs = self.targets(teacher, {"input_ids": batch})
            theirs = None if theirs is None else theirs[:, :-1].flatten(0, 1)
            yield self.logits(model, {"input_ids": batch})[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), theirs

    def judge(self, model: nn.Module, part: str) -> dict[str, Any]:
        return {"perplexity": perplexity(model, self.parts[part], context=512, progress=False).perplexity}


# One arm of one seed.


def base_model(task: Task, options: argparse.Namespace, arm: str, seed: int) -> nn.Module:
    """The model that ``arm`` starts from; the quantized one is calibrated once and kept in a file."""
    model = task.float_model(seed).to(options.device)
    if arm in ("head", "lora"):
        return model
    if arm == "nf4":
        heads = head_layers(model) or None
        quantize_model_ptq(model, backend="bitsandbytes", quantization_bits=4, progress=False, skip_modules=heads)
        return model
    # What is rounded anew starts from nearest codes: residuals say where a weight lies within half a step of its code.
    search = {"algorithm": "search", "iterations": None} if arm == "grid-delay" else {}
    folder = options.results / f"{options.task}-base{'-search' if search else suffix(options)}"
    if not (folder / "config.json").is_file():
        quantize(copy.deepcopy(model), task, options, keep_residual=True, **search).save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).to(options.device)
    new = {key: value for key, value in model.state_dict().items() if set(key.split(".")) & set(HEADS)}
    loaded.load_state_dict(new, strict=False)
    return loaded


def head_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and set(name.split(".")) & set(HEADS)]


def suffix(options: argparse.Namespace) -> str:
    """Of the names of files that depend on how models are quantized; GPTQ has none."""
    if options.ptq_algorithm == "gptq":
        return ""
    return f"-{options.ptq_algorithm}" + (f"-{options.ptq_iterations}" if options.ptq_iterations else "")


def quantize(model: nn.Module, task: Task, options: argparse.Namespace, **fields: Any) -> nn.Module:
    given = {"algorithm": options.ptq_algorithm, "iterations": options.ptq_iterations}
    fields = SCHEME | {"skip_modules": head_layers(model)} | given | fields
    data = None if fields["algorithm"] == "search" else task.calibration()
    return quantize_model_ptq(model.eval(), calibration_data=data, progress=False, **fields)


def run_arm(task: Task, options: argparse.Namespace, arm: str, seed: int, rate: Rate, part: str) -> dict[str, Any]:
    """Train ``arm``; judge it on the part to tune as it is, or on the part to test as it is and as it is shipped."""
    if arm == "lora-signround":
        return signround(task, options, seed)
    model, seconds = trained(task, options, arm, seed, rate)
    found = task.judge(model, part) if part == "tune" else judged(task, options, arm, seed, model)
    return {"rate": rate, "train_seconds": seconds} | found


def trained(task: Task, options: argparse.Namespace, arm: str, seed: int, rate: Rate) -> tuple[nn.Module, float]:
    """``arm`` after its training, and the seconds this took; from its file, if it has one."""
    from qat import train

    from hfquant.hf.rounding import unrounded_copy

    model = freeze(prepared(base_model(task, options, arm, seed), arm, seed), arm)
    file = options.results / f"{run_name(options, arm, seed, rate)}.safetensors"
    if not file.is_file():
        done, before, teacher = 0, 0.0, None
        if arm == "grid-delay":
            done, before = delayed_steps(options), write_rounded(options, seed, rate, task)["seconds"]
            load(model, arm, rounded_file(options, seed, rate))
            teacher = unrounded_copy(model)
            load_model(teacher, teacher_file(options, seed, rate))
            rest_adapters(model)
        torch.manual_seed(2000 + seed)
        losses = task.losses(model, seed, done, teacher, options.distillation)
        seconds = before + train(model, options.steps - done, rate, losses)["seconds"]
        keep(model, arm, file, seconds)
    return model.eval(), load(model, arm, file)


def rest_adapters(model: nn.Module) -> None:
    """Leave scales to train: an adapter that flips single codes undoes what calibration made of them together."""
    for name, parameter in model.named_parameters():
        if "_lora_" in name:
            parameter.requires_grad_(False)


def delayed_steps(options: argparse.Namespace) -> int:
    return max(1, round(DELAY * options.steps))


def rounded_file(options: argparse.Namespace, seed: int, rate: Rate) -> Path:
    return options.results / f"{run_name(options, 'grid-delay', seed, adapter_rate(rate))}-rounded.safetensors"


def teacher_file(options: argparse.Namespace, seed: int, rate: Rate) -> str:
    """The float model before the rounding."""
    return str(rounded_file(options, seed, rate)).replace("-rounded", "-teacher")


def adapter_rate(rate: Rate) -> float:
    return rate if isinstance(rate, float) else rate[0]


def write_rounded(options: argparse.Namespace, seed: int, rate: Rate, task: Task | None = None) -> dict[str, Any]:
    """Keep what "grid-delay" has once its weights are rounded; from there on its optimizer is a new one."""
    from qat import train

    from hfquant.hf.rounding import round_anew, set_rounding, unrounded_copy

    task, file = task or TASKS[options.task](options), rounded_file(options, seed, rate)
    arm = "grid-delay"
    model = freeze(prepared(base_model(task, options, arm, seed), arm, seed), arm)
    if not file.is_file():
        set_rounding(model, False)
        torch.manual_seed(2000 + seed)
        started = time.perf_counter()
        train(model, delayed_steps(options), adapter_rate(rate), task.losses(model, seed))
        save_model(unrounded_copy(model), teacher_file(options, seed, rate))
        how = {"algorithm": options.ptq_algorithm, "iterations": options.ptq_iterations}
        round_anew(model, task.calibration(), progress=False, **how)
        keep(model, arm, file, time.perf_counter() - started)
    return {"seconds": load(model, arm, file)}


def keep(model: nn.Module, arm: str, file: Path, seconds: float) -> None:
    """Write what ``arm`` trains, or all of a model whose codes may be others than its base's."""
    metadata, unfinished = {"seconds": str(seconds)}, f"{file}.{os.getpid()}"
    if arm == "grid-delay":
        save_model(model, unfinished, metadata)
    else:
        tensors = {name: p.data.contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(tensors, unfinished, metadata)
    os.replace(unfinished, file)


def load(model: nn.Module, arm: str, file: Path) -> float:
    """Give ``model`` what ``keep`` wrote; returns the seconds of its training."""
    with safe_open(file, "pt") as kept:
        seconds = float(kept.metadata()["seconds"])
    if arm == "grid-delay":
        load_model(model, file)
        return seconds
    tensors, parameters = load_file(file), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return seconds


def judged(task: Task, options: argparse.Namespace, arm: str, seed: int, model: nn.Module) -> dict[str, Any]:
    result: dict[str, Any] = {"unmerged": task.judge(model, "test")}
    if arm == "head":
        return result
    plain = copy.deepcopy(model) if arm == "side" else None
    shipped = merged(model, arm, merged_folder(options, arm, seed))
    if arm == "lora":
        shipped.save_pretrained(merged_folder(options, arm, seed))
        return result | {"ptq": task.judge(quantize(shipped, task, options), "test")}
    result["merged"] = task.judge(shipped, "test")
    if plain is not None:
        result["report"] = vars(model.base_model.model.merge_report)
        result["merged without residuals"] = task.judge(merge_side_adapter(without_residuals(plain)), "test")
        result["report without residuals"] = vars(plain.base_model.model.merge_report)
    if arm != "nf4":
        result["codes_changed"] = changed_codes(base_model(task, options, arm, seed), shipped)
    return result


def without_residuals(model: nn.Module) -> nn.Module:
    """``model`` as if PTQ had not kept what rounding took from its weights."""
    for _, module in packed_modules(model):
        module._parameters.pop("weight_residual", None)
    return model


def run_name(options: argparse.Namespace, arm: str, seed: int, rate: Rate) -> str:
    from qat import shown

    return f"{options.task}-{arm}-s{seed}-lr{shown(rate)}{suffix(options)}"


def merged_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return options.results / f"{options.task}-{arm}-s{seed}{suffix(options)}.merged"


def signround(task: Task, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What ``lora`` left, quantized with learned rounding."""
    kind = type(task.float_model(seed))
    model = kind.from_pretrained(merged_folder(options, "lora", seed), dtype=torch.float32).to(options.device)
    return {
        "rate": 0.0,
        "train_seconds": 0.0,
        "ptq": task.judge(quantize(model, task, options, algorithm="signround"), "test"),
    }


TASKS: dict[str, type[Task]] = {"classification": Classification, "language": Language}


def run_here(options: argparse.Namespace, arm: str, seed: int, rate: Rate, part: str) -> dict[str, Any]:
    return run_arm(TASKS[options.task](options), options, arm, seed, rate, part)


def write_base(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize the models that the quantized arms start from."""
    for arm in ("grid", "grid-delay"):
        base_model(TASKS[options.task](options), options, arm, options.seeds[0])
    return {}


def runs(options: argparse.Namespace, wanted: list[tuple[str, int, Rate, str]]) -> list[dict[str, Any]]:
    """The results of ``(arm, seed, rate, part)``: from their files, or from new processes."""
    from arms import results

    calls, first = {}, {}
    for arm, seed, rate, part in wanted:
        calls[run_name(options, arm, seed, rate) + ("-tune" if part == "tune" else "")] = (
            run_here,
            (options, arm, seed, rate, part),
        )
        if arm == "grid-delay":
            first[rounded_file(options, seed, rate).stem] = write_rounded, (options, seed, rate)
    how = {"jobs": options.jobs, "threads": options.threads, "reuse": options.device != "cpu"}
    results(options.results, first, **how)
    return results(options.results, calls, **how)


def found_of(options: argparse.Namespace, chosen: list[str]) -> dict[str, list[dict[str, Any]]]:
    """All seeds of all arms; the first seed tunes, and what quantizes another arm's model comes last."""
    from arms import results
    from qat import shown

    base = {f"{options.task}-base{suffix(options)}": (write_base, (options,))}
    results(options.results, base, threads=options.threads)
    task, first = TASKS[options.task], options.seeds[0]
    rates = {arm: RATES[arm][-3 if options.task == "language" else 0 :] for arm in chosen}
    if options.rates:
        rates |= {arm: tuple(options.rates) for arm in chosen if RATES[arm] is ADAPTER_RATES}
    tried = [(arm, first, rate, "tune") for arm in chosen if len(rates[arm]) > 1 for rate in rates[arm]]
    judged = list(zip(tried, runs(options, tried), strict=True))
    for arm in chosen:
        own = [(task.sign * found[task.measure], rate) for (a, _, rate, _), found in judged if a == arm]
        rates[arm] = (min(own)[1],) if own else rates[arm]
    wanted = [(arm, seed, rates[arm][0], "test") for arm in chosen for seed in options.seeds]
    runs(options, [one for one in wanted if one[0] != "lora-signround"])
    found = {arm: runs(options, [one for one in wanted if one[0] == arm]) for arm in chosen}
    for arm, results_of in found.items():
        results_of[0]["tuned"] = {shown(rate): r[task.measure] for (a, _, rate, _), r in judged if a == arm}
    return found


# A tiny random model and random data, in seconds.


class SmokeLanguage(Language):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.parts = {name: torch.arange(300) % 250 for name in ("train", "tune", "test")}

    def float_model(self, seed: int) -> nn.Module:
        from qat import tiny_llama

        torch.manual_seed(0)
        return tiny_llama()

    def calibration(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": window.unsqueeze(0)} for window in self.parts["train"].split(50)]


class SmokeClassification(Classification):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.batch = options, options.batch
        rows = [([2 + i % 90, 3 + i % 50, 5, 7], i % 2) for i in range(160)]
        self.parts = {"train": rows, "tune": rows[:16], "test": rows[16:48]}

    def float_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))


SMOKE: dict[str, type[Task]] = {"language": SmokeLanguage, "classification": SmokeClassification}


def smoke(given: list[str]) -> dict[str, Any]:
    """Every arm of both tasks, in this process."""
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in SMOKE.items():
            options = arguments([name, *given, "--steps", "2", "--batch", "4", "--context", "16", "--seeds", "0"])
            options.results = Path(folder)
            task = kind(options)
            arms = [arm for arm in ARMS if (name, arm) != ("language", "head")]
            found = {
                arm: [run_arm(task, options, arm, 0, RATES[arm][-1], "test") | {"computed_on": ""}] for arm in arms
            }
            tables[name] = tables_of(found, name)
    return tables


# The table.


def rows_of(arm: str, results: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    from qat import shown

    kinds = [kind for kind in results[0] if isinstance(results[0][kind], dict) and measure in results[0][kind]]
    rows = []
    for kind in kinds:
        values = [result[kind][measure] for result in results]
        row = {"arm": arm if kind == "unmerged" else f"{arm}, {kind}", "rate": shown(results[0]["rate"])}
        row |= {measure: statistics.fmean(values), "seeds": len(values)}
        row["deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        if kind == "merged" and "codes_changed" in results[0]:
            row["codes_changed_percent"] = 100 * statistics.fmean(result["codes_changed"] for result in results)
        row["train_seconds"] = statistics.median(result["train_seconds"] for result in results)
        row["computed_on"] = ", ".join(sorted({result["computed_on"] for result in results}))
        rows.append(row)
    return rows


def paired_bootstrap(left: list[str], right: list[str], draws: int = 10000) -> dict[str, float]:
    """Difference in accuracy of ``left`` and ``right`` in points, mean over seeds, and its 95 % interval.

    Examples are drawn with replacement, the same for both arms and all seeds.
    """
    values = [
        torch.tensor([[int(c) for c in text] for text in arm], dtype=torch.float64).mean(0) for arm in (left, right)
    ]
    difference = 100 * (values[0] - values[1])
    generator = torch.Generator().manual_seed(0)
    means = torch.stack(
        [
            difference[torch.randint(0, len(difference), (len(difference),), generator=generator)].mean()
            for _ in range(draws)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"difference": float(difference.mean()), "low": low, "high": high}


def comparisons(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merged grid, scales and side beside the baselines: paired differences, and the share of LoRA's gain they keep."""
    texts = {
        (arm, kind): [result[kind]["right"] for result in results]
        for arm, results in found.items()
        for kind in results[0]
        if isinstance(results[0][kind], dict) and "right" in results[0][kind]
    }
    rows = []
    for arm in ("grid", "grid-delay", "scales", "side"):
        for other in [key for key in texts if key[0] in ("head", "lora", "nf4")]:
            if (arm, "merged") in texts:
                against = other[0] if other[1] == "unmerged" else ", ".join(other)
                row = {"arm": f"{arm}, merged", "against": against}
                rows.append(row | paired_bootstrap(texts[arm, "merged"], texts[other]))
    return rows


def gains(rows: list[dict[str, Any]]) -> None:
    """Add to every row how much of the gain of LoRA over the head alone it keeps."""
    accuracy = {row["arm"]: row["accuracy"] for row in rows}
    if "head" in accuracy and "lora" in accuracy:
        for row in rows:
            gain = row["accuracy"] - accuracy["head"]
            whole = accuracy["lora"] - accuracy["head"]
            row["gain_kept_percent"] = 100 * gain / whole if whole else 0.0


def tabulate(options: argparse.Namespace) -> dict[str, Any]:
    arms = [arm for arm in ARMS if not options.arms or arm in options.arms]
    if options.task == "language":
        arms = [arm for arm in arms if arm != "head"]
    return tables_of(found_of(options, arms), options.task)


def tables_of(found: dict[str, list[dict[str, Any]]], task: str) -> dict[str, Any]:
    rows = [row for arm, results in found.items() for row in rows_of(arm, results, TASKS[task].measure)]
    if task == "language":
        return {"rows": rows}
    gains(rows)
    return {"rows": rows, "paired": comparisons(found)}


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--positive", type=Path, help="sentences, one a line, Latin-1")
    parser.add_argument("--negative", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--results", type=Path, default=HERE.with_name("results") / "finetune")
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="learning rates of adapters to try instead")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--ptq-algorithm", choices=("gptq", "signround"), default="gptq")
    parser.add_argument("--distillation", type=float, default=1.0, help="share in the loss of grid-delay at its end")
    parser.add_argument("--ptq-iterations", type=int, help="of signround")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="0 takes all")
    parser.add_argument("--tune-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1, help="of one arm")
    parser.add_argument("--jobs", type=int, default=1, help="how many arms at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="train by autocast to bfloat16; judged as without it")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(given)
    classification = options.task == "classification"
    options.steps = options.steps or (150 if classification else 20)
    options.batch = options.batch or (16 if classification else 4)
    options.seeds = options.seeds or (list(range(5)) if classification else [0])
    options.given = given
    return options


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(sys.argv[1:] if given is None else given)
    torch.set_num_threads(options.threads)
    if options.smoke:
        return smoke(options.given)
    from quality import finish, machine

    command = "python benchmarks/finetune.py " + " ".join(Path(a).name for a in options.given)
    return finish(machine(options.device) | {"command": command} | tabulate(options), options.json)


if __name__ == "__main__":
    main()

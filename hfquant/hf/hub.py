"""Sharing on the Hub: the model card, and a push that leaves no stale file behind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hfquant.errors import ConfigError
from hfquant.formats.quality_report import REPORT_FILE, read_report, report_markdown
from hfquant.hf.source import local_folder
from hfquant.hf.verify import EXPORT_RECORD


WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf"),
    *("quantize_config.json", EXPORT_RECORD),
)
"""What an earlier push may have left, and a loader might take for the model."""

QUALITY = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the original",
    "mean_kl": "mean KL divergence from the original, nats",
    "top1_agreement": "top-1 agreement with the original",
}
"""Figures of ``hfquant evaluate --json`` that the card shows."""

TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the base model's card that the card takes over."""


def model_card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    repo_id: str | None = None,
    quality: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
) -> ModelCard:
    """The card of a quantized checkpoint, an export or an adapter, with the quality report where there is one.

    Args:
        folder: The checkpoint.
        base_model: Name on the Hub of the model it was made from; its card is asked for licence and language.
        repo_id: Where it will be, for the snippet.
        quality: What ``hfquant evaluate --json`` printed.
        metadata: Fields for the head of the card that win over everything else.
        token: For a private base model.
    """
    path = Path(folder)
    facts = _facts(path)
    fields: dict[str, Any] = _base_metadata(base_model, token)
    adapter = (path / "adapter_config.json").is_file()
    if base_model is not None:
        fields |= {"base_model": base_model, "base_model_relation": "adapter" if adapter else "quantized"}
    library = "peft" if adapter else "transformers"
    fields |= {"library_name": library, "tags": facts["tags"]} | dict(metadata or {})
    name = repo_id or path.resolve().name
    lines = [f"# {name.rpartition('/')[2]}", "", facts["summary"], ""]
    if base_model is not None:
        lines += [f"Made from [{base_model}](https://huggingface.co/{base_model}) with hfquant.", ""]
    lines += ["## Use", "", "```python", *facts["snippet"](name), "```", ""]
    if (path / REPORT_FILE).is_file():
        lines += ["## How it was quantized", "", report_markdown(read_report(path))]
    if quality:
        lines += ["## Quality", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {label} | {quality[key]:.4g} |" for key, label in QUALITY.items() if key in quality]
        if quality.get("command"):
            lines += ["", f"Measured with `{quality['command']}`."]
    head = ModelCardData(**fields)
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n")


def _facts(folder: Path) -> dict[str, Any]:
    """Summary, tags and snippet of a checkpoint.

    Raises:
        ConfigError: If ``folder`` holds neither a quantized model nor an adapter nor an export.
    """
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        summary = f"An adapter for the quantized model `{base}`."
        return {"summary": summary, "tags": ["hfquant", "lora"], "snippet": _adapter_snippet}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    model_class = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        summary = f"GGUF for llama.cpp: {', '.join(f'`{name}`' for name in files)}."
        return {"summary": summary, "tags": ["hfquant", "gguf"], "snippet": _gguf_snippet(model_class, files[0])}
    if method is None and not (folder / EXPORT_RECORD).is_file():
        raise ConfigError(f"{folder}: the model is not quantized; push it with model.push_to_hub(...)")
    schemes = sorted(set((quantization.get("modules") or {}).values()))
    bits = sorted({scheme[3] for scheme in schemes if scheme.startswith("int")})
    if method == "gptq":
        bits = [str(quantization.get("bits"))]
    elif method == "compressed-tensors":
        bits = sorted({str(group["weights"]["num_bits"]) for group in quantization["config_groups"].values()})
    tags = ["hfquant", *([method] if method not in ("hfquant", None) else []), *(f"{count}-bit" for count in bits)]
    shown = f" ({', '.join(schemes)})" if schemes else ""
    summary = (
        f"Weights in {' and '.join(f'INT{count}' for count in bits) or 'float'}{shown}, format `{method or 'dense'}`."
    )
    imports = ["import hfquant"] if method == "hfquant" else []
    return {"summary": summary, "tags": tags, "snippet": _snippet(model_class, imports)}


def _snippet(model_class: str, imports: list[str]) -> Any:
    def lines(name: str) -> list[str]:
        load = f'model = {model_class}.from_pretrained("{name}")'
        return [*imports, f"from transformers import {model_class}", "", load]

    return lines


def _gguf_snippet(model_class: str, file: str) -> Any:
    def lines(name: str) -> list[str]:
        load = f'model = {model_class}.from_pretrained("{name}", gguf_file="{file}")'
        return [f"from transformers import {model_class}", "", load]

    return lines


def _adapter_snippet(name: str) -> list[str]:
    return [
        "import hfquant",
        "from peft import AutoPeftModelForCausalLM",
        "",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
    ]


def _base_metadata(base_model: str | None, token: str | bool | None) -> dict[str, Any]:
    """What the card of the base model says about licence and language; nothing if it cannot be read."""
    if base_model is None:
        return {}
    try:
        card = ModelCard.load(base_model, token=token if isinstance(token, str) else None)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return {}
    found = card.data.to_dict()
    return {key: found[key] for key in TAKEN_OVER if key in found}


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    quality: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
) -> str:
    """Push a checkpoint with its card in one commit, which also removes weight files of earlier pushes.

    ``model.push_to_hub`` works too, but never deletes: a re-push with fewer shards then leaves old ones behind.

    Args:
        folder: Quantized model, export or adapter.
        repo_id: ``user/name``.
        base_model: As in ``model_card``; so are ``quality`` and ``metadata``. A ``README.md`` in ``folder`` is kept.
        quality: Figures for the card.
        metadata: Fields for the head of the card.
        private: Whether a new repository is private.
        token: As in Transformers.
        revision: Branch, made if it does not exist.
        create_pr: Open a pull request.
        commit_message: Of the one commit.

    Returns:
        Address of the commit or pull request.

    Raises:
        ConfigError: If ``folder`` holds nothing to push.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        path = local_folder(folder)
    card = path / "README.md"
    if not card.is_file():
        made = model_card(path, base_model=base_model, repo_id=repo_id, quality=quality, metadata=metadata, token=token)
        made.save(card)
    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(name, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        folder_path=path,
        repo_id=name,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        delete_patterns=list(WEIGHT_FILES),
        ignore_patterns=["*.partial", ".cache/*", "optimizer.pt", "*.pth"],
    )
    return str(commit.pr_url or commit.commit_url)

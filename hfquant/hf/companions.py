"""The files that travel with a model's weights."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download


COMPANION_FILES = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.py", "LICENSE*", "NOTICE*"),
    *("additional_chat_templates/*.jinja", "[0-9]_*/config.json"),
)
"""Tokenizer, processor, chat templates, code, licence, modules of sentence encoders: what belongs to a model."""

OWN_FILES = (
    *("config.json", "generation_config.json", "*.index.json", "trainer_state.json", "requirements*.txt"),
    *("quantize_config.json", "hfquant_export.json"),
)
"""What is written anew for each folder, and what is about the folder and not about the model."""


def copy_companion_files(model: str | Path, target: Path) -> None:
    """Copy what belongs to ``model`` (folder or Hub name) beside its weights into ``target``, byte for byte."""
    source = Path(model)
    if not source.is_dir():
        source = Path(snapshot_download(str(model), allow_patterns=list(COMPANION_FILES)))
    found = {file for pattern in COMPANION_FILES for file in source.glob(pattern)}
    for file in sorted(found):
        if file.is_file() and not any(file.match(pattern) for pattern in OWN_FILES if file.parent == source):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)

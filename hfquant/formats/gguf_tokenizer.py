"""GGUF's tokenizer fields, from the ``tokenizer.json`` of a Hugging Face tokenizer."""

import json
from pathlib import Path
from typing import Any

from hfquant.errors import FormatError


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA3_SPLIT, "bytes"): "llama-bpe",
    (LLAMA3_SPLIT.replace("{1,3}", ""), "bytes"): "qwen2",
    (TEKKEN_SPLIT, "bytes"): "tekken",
}
"""How text is cut before merging -> llama.cpp's name for it."""


def tokenizer_fields(folder: Path, vocab_size: int) -> dict[str, Any]:
    """``tokenizer.*`` keys and values.

    Args:
        folder: With ``tokenizer.json`` and, if there is one, ``tokenizer_config.json``.
        vocab_size: Rows of the embedding table; ids without a token become unused ones.

    Raises:
        FormatError: If the tokenizer is of a kind that llama.cpp has no name for, or is damaged.
    """
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = tokenizer["model"]
        vocabulary: dict[str, int] = model["vocab"] if model["type"] == "BPE" else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"tokenizer.json cannot be read ({error!r}); llama.cpp needs its vocabulary") from error
    if not vocabulary:
        raise FormatError(f"tokenizer.json holds a {model['type']} model; only BPE tokenizers can be written to GGUF")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    spm = bool(model.get("byte_fallback"))
    fields: dict[str, Any] = {"tokenizer.ggml.model": "llama" if spm else "gpt2"}
    fields |= _vocabulary(tokenizer, vocabulary, vocab_size)
    if spm:
        ranks = {left_right.replace(" ", ""): -float(rank) for rank, left_right in reversed(list(enumerate(merges)))}
        fields["tokenizer.ggml.scores"] = [ranks.get(t, -1e6) for t in fields["tokenizer.ggml.tokens"]]
        fields["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
        fields["tokenizer.ggml.pre"] = "default"
    else:
        fields["tokenizer.ggml.merges"] = merges
        fields["tokenizer.ggml.pre"] = pre_tokenizer_name(tokenizer.get("pre_tokenizer"))
    return fields | _special_tokens(folder, tokenizer, fields["tokenizer.ggml.tokens"])


def pre_tokenizer_name(pre_tokenizer: Any) -> str:
    """llama.cpp's name for a ``pre_tokenizer`` of ``tokenizer.json``.

    Raises:
        FormatError: If it has none that is known here.
    """
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    signature = []
    for part in parts:
        if part.get("type") == "Split":
            signature.append(part.get("pattern", {}).get("Regex", "?"))
        elif part.get("type") == "ByteLevel":
            plain = not part.get("add_prefix_space", False)
            signature.append(("ByteLevel" if part.get("use_regex", True) else "bytes") if plain else "prefix space")
        else:
            individual = part.get("individual_digits", True)
            signature.append(part.get("type", "none") if individual else "grouped digits")
    name = PRE_TOKENIZERS.get(tuple(signature))
    if name is None:
        raise FormatError(
            f"the pre-tokenizer {signature} has no llama.cpp name known to hfquant; convert the compressed-tensors "
            "export with llama.cpp's own convert_hf_to_gguf.py"
        )
    return name


def _vocabulary(tokenizer: dict[str, Any], vocabulary: dict[str, int], vocab_size: int) -> dict[str, Any]:
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for text, number in vocabulary.items():
        byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[number], types[number] = text, BYTE if byte and tokenizer["model"].get("byte_fallback") else NORMAL
    unknown = tokenizer["model"].get("unk_token")
    if unknown in vocabulary:
        types[vocabulary[unknown]] = UNKNOWN
    for added in tokenizer.get("added_tokens", ()):
        number = added["id"]
        tokens[number] = added["content"]
        if types[number] != UNKNOWN:
            types[number] = CONTROL if added.get("special") else USER_DEFINED
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _special_tokens(folder: Path, tokenizer: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    file, ids = folder / "tokenizer_config.json", {token: number for number, token in enumerate(tokens)}
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fields: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            fields[f"tokenizer.ggml.{name}_token_id"] = ids[token]
    around = json.dumps(tokenizer.get("post_processor"))
    for key, name in (("bos", "bos"), ("eos", "eos")):
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        own = json.dumps(tokens[number]) if number is not None else '"?"'
        fields[f"tokenizer.ggml.add_{key}_token"] = f'"id": {own}' in around
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(chat, str):
        fields["tokenizer.chat_template"] = chat
    return fields

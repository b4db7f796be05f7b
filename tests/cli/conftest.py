"""A tiny model with a tokenizer, on disk, and the command line in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hfquant.cli.main import app


SPECIAL = {"<s>": 256, "</s>": 257}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, <s> in front and </s> behind."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | SPECIAL, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(SPECIAL.items()))
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama whose layers have 64 or 128 inputs, with a tokenizer, a licence, and files that are not the model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
    )
    folder = tmp_path_factory.mktemp("models") / "float"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("free\n")
    (folder / "README.md").write_text("about the float model\n")
    (folder / "optimizer.pt").write_bytes(b"weights of another kind")
    return folder


@pytest.fixture(scope="session")
def quantized_model(float_model: Path, run_json: Callable[..., Any]) -> Path:
    """The same model as the command line saves it in INT4."""
    folder = float_model.with_name("int4")
    run_json("quantize", float_model, "-o", folder, "--bits", 4, "--group-size", 32)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 20, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """Run a verb; the result has ``exit_code``, ``stdout`` and ``stderr``."""

    def call(*words: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def run_json(run: Callable[..., Result]) -> Callable[..., Any]:
    """Run a verb with ``--json``; the one object on stdout."""

    def call(*words: object) -> Any:
        result = run(*words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return call


@pytest.fixture(scope="session")
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """Run a verb that must fail with exit code 1 and a message; the message."""

    def call(*words: object) -> str:
        result = run(*words)
        message = result.stderr.strip().splitlines()[-1]
        assert result.exit_code == 1, result.stderr
        assert message.startswith("hfquant: ")
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        return message

    return call

"""GGUF exports: read back by gguf-py and by Transformers, exactly; tokenizers without a donor file."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

from hfquant import ConfigError, FormatError, SchemeError, dequantize_model, export_model, quantize_model_ptq
from hfquant.formats.gguf_tokenizer import LLAMA3_SPLIT, pre_tokenizer_name, tokenizer_fields
from hfquant.hf.export_gguf import rope_factors
from tests.support.tiny_models import TEXT, build, output


gguf = pytest.importorskip("gguf")

SIZES = TEXT | {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 128}

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}

SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "int4-g32": ({"quantization_bits": 4, "group_size": 32}, "Q4_0"),
    "int4-g64": ({"quantization_bits": 4, "group_size": 64, "embedding_bits": 4}, "Q4_0"),
    "int8": ({"quantization_bits": 8, "quantization_type": "weight_only"}, "Q8_0"),
    "int8-g32": ({"quantization_bits": 8, "quantization_type": "weight_only", "group_size": 32}, "Q8_0"),
}


# Bit for bit against engines that multiply in float: the claim of the reference kernels.
pytestmark = pytest.mark.usefixtures("reference_kernels")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[:120]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def saved(family: str, fields: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    config = FAMILIES[family]
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}ForCausalLM")
    model = quantize_model_ptq(model_class(config).eval(), progress=False, **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_back_the_same_logits(
    family: str, scheme: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    fields, kind = SCHEMES[scheme]
    model = saved(family, fields, tmp_path / "native", tokenizer)
    report = export_model(tmp_path / "native", "gguf", tmp_path / "x", engine="llama.cpp", progress=False)
    (file,) = (tmp_path / "x").glob(f"*-{kind}.gguf")
    assert {report.schemes[name] for name in report.schemes if name.startswith("blk.")} == {kind}
    again = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(output(again.eval(), "llama"), output(dequantize_model(model), "llama"))


def test_blocks_hold_the_codes_themselves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = saved("qwen2", SCHEMES["int4-g32"][0], tmp_path / "native", tokenizer)
    export_model(tmp_path / "native", "gguf", tmp_path / "x", progress=False)
    reader = gguf.GGUFReader(next((tmp_path / "x").glob("*.gguf")))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = gguf.quants.dequantize(tensors["blk.1.ffn_down.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(values, model.model.layers[1].mlp.down_proj.dequantize().numpy())
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert "output.weight" not in tensors
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen2"
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (2, 2)
    assert fields["tokenizer.ggml.eos_token_id"] == 121
    assert len(fields["tokenizer.ggml.tokens"]) == 128


def test_asymmetric_weights_need_exact_offsets(tmp_path: Path) -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, group_size=32, symmetric=False, progress=False)
    with pytest.raises(SchemeError, match=r"have no exact float16 value in GGUF's Q4_1; .*symmetric=True"):
        export_model(model, "gguf", tmp_path / "x", progress=False)
    for module in model.modules():
        if hasattr(module, "scheme"):
            scale = module.weight_scale.view(torch.bfloat16)
            scale.copy_(scale.float().log2().round().exp2())
    export_model(model, "gguf", tmp_path / "x", progress=False)
    (file,) = (tmp_path / "x").glob("*-Q4_1.gguf")
    again = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(output(again.eval(), "llama"), output(dequantize_model(model), "llama"))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "group-16": ("llama", {"quantization_bits": 4, "group_size": 16}, "in groups of a multiple of 32"),
    "int8-asym": ("llama", {"quantization_bits": 8, "symmetric": False}, "symmetric=True for INT8"),
    "rows": ("llama-odd", {"quantization_bits": 4, "group_size": -1, "embedding_bits": 16}, "36 inputs"),
    "mixtral": ("mixtral", {"quantization_bits": 4}, "model_type 'mixtral'.*convert_hf_to_gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_block_is_refused(case: str, tmp_path: Path) -> None:
    name, fields, message = REFUSED[case]
    model = quantize_model_ptq(build(name), progress=False, **fields)
    with pytest.raises(ConfigError, match=message):
        export_model(model, "gguf", tmp_path / "x", progress=False)
    assert list(tmp_path.iterdir()) == []


def split(pattern: str) -> Any:
    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (split(LLAMA3_SPLIT), "llama-bpe"),
        (split(LLAMA3_SPLIT.replace("{1,3}", "")), "qwen2"),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2"],
)
def test_pre_tokenizers_have_llama_cpp_names(pre_tokenizer: Any, name: str) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    assert pre_tokenizer_name(json.loads(backend.to_str())["pre_tokenizer"]) == name


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no llama.cpp name"):
        pre_tokenizer_name({"type": "Split", "pattern": {"Regex": "."}})
    with pytest.raises(FormatError, match="no llama.cpp name"):
        pre_tokenizer_name({"type": "ByteLevel", "add_prefix_space": True})
    Tokenizer(models.WordPiece(vocab={"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match="WordPiece"):
        tokenizer_fields(tmp_path, 1)
    with pytest.raises(FormatError, match=re.escape("tokenizer.json cannot be read")):
        tokenizer_fields(tmp_path / "none", 1)


def test_sentencepiece_like_tokenizers_get_scores(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8}
    model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    fields = tokenizer_fields(tmp_path, 10)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 5]
    scores = fields["tokenizer.ggml.scores"]
    assert scores[7] > scores[8] > scores[5]
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def test_llama3_frequencies_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / torch.from_numpy(rope_factors(config)), scaled)

"""Every text model that Transformers can build from a small config: quantized, saved, loaded, dequantized.

Sizes are set by name where a config has such a field. A model that cannot be built so, or cannot run in float, is
skipped; how many remain is asserted, so that the test cannot pass by skipping.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from hfquant import dequantize_model, quantize_model_ptq


LISTS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM")
WIDTH = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size")
INNER = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size")
HEADS = ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SIZES: dict[str, Any] = (
    dict.fromkeys(WIDTH, 64)
    | dict.fromkeys(INNER, 128)
    | dict.fromkeys(HEADS, 4)
    | dict.fromkeys(LAYERS, 4)
    | dict.fromkeys(EXPERTS, 4)
    | {"vocab_size": 200, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "n_group": 1}
    | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "topk_group": 1, "first_k_dense_replace": 1}
    | {"max_position_embeddings": 128, "n_positions": 128, "d_kv": 16, "rotary_dim": 8, "state_size": 8}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0, "decoder_layerdrop": 0.0}
)
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 32}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LARGEST = 20_000_000
"""Parameters; where a config hides its sizes in others, the model is too large for this test."""

SCHEMES: dict[str, dict[str, Any]] = {
    "int8-dynamic": {"quantization_bits": 8},
    "int4-embedding4": {"quantization_bits": 4, "embedding_bits": 4},
}


def listed() -> list[tuple[str, str]]:
    """Kind of config, class of the model."""
    found: dict[str, str] = {}
    for name in LISTS:
        for kind, model in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            found.setdefault(model[0] if isinstance(model, tuple) else model, kind)
    return [(kind, model) for model, kind in found.items()]


def small_model(kind: str, name: str) -> PreTrainedModel:
    config_class = CONFIG_MAPPING[kind]
    default, sizes = config_class(), SIZES | (LATENT if "kv_lora_rank" in dir(config_class()) else {})
    given = {key: value for key, value in sizes.items() if hasattr(default, key)}
    if getattr(default, "head_dim", None) is None or isinstance(getattr(config_class, "head_dim", None), property):
        given.pop("head_dim", None)
    config, model_class = config_class(**given), getattr(transformers, name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 15).unsqueeze(0)
    decoder = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder).logits.float()


def quantized_saved_and_loaded(model: PreTrainedModel, expected: Tensor, folder: Path) -> str | None:
    """What went wrong."""
    for scheme, fields in SCHEMES.items():
        quantized = quantize_model_ptq(copy.deepcopy(model), **fields, progress=False)
        found = logits(quantized)
        if not bool(found.isfinite().all()) or torch.equal(found, expected):
            return f"{scheme}: not finite, or not quantized"
        quantized.save_pretrained(folder / scheme)
        if not torch.equal(logits(type(model).from_pretrained(folder / scheme)), found):
            return f"{scheme}: the loaded model differs"
        plain = logits(dequantize_model(quantized))
        if scheme.startswith("int4") and not torch.allclose(plain, found, atol=0.01 * float(found.abs().max())):
            return f"{scheme}: the dequantized model differs by {float((plain - found).abs().max())}"
    return None


@pytest.mark.slow
def test_every_architecture_that_can_be_built_small(tmp_path: Path) -> None:
    ran, wrong = 0, {}
    for kind, name in listed():
        try:
            model = small_model(kind, name)
            expected = logits(model)
        except Exception:  # the float model's own affair
            continue
        ran += 1
        try:
            reason = quantized_saved_and_loaded(model, expected, tmp_path / name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            wrong[name] = reason
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())
    assert ran >= 150  # of 264 that Transformers 5.23 lists, 195

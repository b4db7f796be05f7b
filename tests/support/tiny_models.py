"""Tiny random models of many architectures, built from their configs, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import Tensor


@dataclass(frozen=True)
class TinyModel:
    """How to build one model, what to feed it, whether it generates text, and the share of weights to be packed."""

    build: Callable[[], t.PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    generates: bool = False
    coverage: float = 0.75


TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def text_inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 19).unsqueeze(0)}


def seq2seq_inputs() -> dict[str, Tensor]:
    return text_inputs() | {"decoder_input_ids": torch.arange(5, 10).unsqueeze(0)}


def image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}


def audio_inputs() -> dict[str, Tensor]:
    features = torch.linspace(-1, 1, 16 * 40).view(1, 16, 40)
    return {"input_features": features, "decoder_input_ids": torch.arange(5, 10).unsqueeze(0)}


def image_text_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[1, *([127] * 4), 5, 6, 7, 8]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image_inputs()


def llama(**changes: Any) -> t.PreTrainedModel:
    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT | {"tie_word_embeddings": False} | changes))


def gpt2() -> t.PreTrainedModel:
    config = t.GPT2Config(
        vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return t.GPT2LMHeadModel(config)


def opt() -> t.PreTrainedModel:
    return t.OPTForCausalLM(t.OPTConfig(**TEXT | {"ffn_dim": 96, "word_embed_proj_dim": 64}))


def bert() -> t.PreTrainedModel:
    return t.BertModel(t.BertConfig(**TEXT))


def bert_mlm() -> t.PreTrainedModel:
    return t.BertForMaskedLM(t.BertConfig(**TEXT))


def mixtral() -> t.PreTrainedModel:
    return t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> t.PreTrainedModel:
    config = t.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    return t.Qwen3MoeForCausalLM(config)


def gpt_oss() -> t.PreTrainedModel:
    config = t.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=16)
    return t.GptOssForCausalLM(config)


def llama4() -> t.PreTrainedModel:
    """Its experts get every token, and one layer in two has none; heads are as large as its rope wants them."""
    config = t.Llama4TextConfig(
        **TEXT, num_local_experts=4, head_dim=16, intermediate_size_mlp=96, interleave_moe_layer_step=2
    )
    return t.Llama4ForCausalLM(config)


def olmo() -> t.PreTrainedModel:
    """Its norms have no weights: once it is quantized, no float parameter is left."""
    return t.OlmoForCausalLM(t.OlmoConfig(**TEXT))


def deepseek_v3() -> t.PreTrainedModel:
    """Latent attention; its first layer has no experts."""
    config = t.DeepseekV3Config(
        **TEXT | {"num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    return t.DeepseekV3ForCausalLM(config)


def qwen3_next() -> t.PreTrainedModel:
    """One layer of linear attention, one of gated attention, both with experts and a shared one."""
    config = t.Qwen3NextConfig(
        **TEXT,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return t.Qwen3NextForCausalLM(config)


def gemma3() -> t.PreTrainedModel:
    config = t.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=16, query_pre_attn_scalar=16)
    return t.Gemma3ForCausalLM(config)


def gemma4() -> t.PreTrainedModel:
    """Layers have tables of their own, all in one; the model around the text model reads a row of the first table."""
    text = t.Gemma4TextConfig(
        **TEXT,
        head_dim=16,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=128,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    )
    vision = t.Gemma4VisionConfig(**VISION, num_key_value_heads=4, head_dim=16, position_embedding_size=16)
    config = t.Gemma4Config(text_config=text.to_dict(), vision_config=vision.to_dict(), audio_config=None)
    return t.Gemma4ForConditionalGeneration(config)


def bart() -> t.PreTrainedModel:
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in BART_SIDE.items()}
    config = t.BartConfig(
        vocab_size=128, d_model=64, max_position_embeddings=64, scale_embedding=True, forced_eos_token_id=2, **sizes
    )
    return t.BartForConditionalGeneration(config)


BART_SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 96}


def t5() -> t.PreTrainedModel:
    config = t.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return t.T5ForConditionalGeneration(config)


def vit() -> t.PreTrainedModel:
    config = t.ViTConfig(**VISION, num_labels=5)
    return t.ViTForImageClassification(config)


VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def whisper() -> t.PreTrainedModel:
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in BART_SIDE.items()}
    config = t.WhisperConfig(
        vocab_size=128,
        d_model=64,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **{key.replace("num_", ""): value for key, value in sizes.items()},
    )
    return t.WhisperForConditionalGeneration(config)


def llava() -> t.PreTrainedModel:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION).to_dict(),
        text_config=t.LlamaConfig(**TEXT).to_dict(),
        image_token_index=127,
        vision_feature_layer=-1,
    )
    return t.LlavaForConditionalGeneration(config)


def falcon() -> t.PreTrainedModel:
    config = t.FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    return t.FalconForCausalLM(config)


def marian() -> t.PreTrainedModel:
    """Its position tables are not saved, and its embedding is tied to a table that no accessor names."""
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in BART_SIDE.items()}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 1}
    return t.MarianMTModel(t.MarianConfig(vocab_size=128, d_model=64, max_position_embeddings=64, **sizes, **tokens))


def mamba() -> t.PreTrainedModel:
    """Reads some of its weights itself; its head is one of them, and tied to the embedding."""
    return t.MambaForCausalLM(t.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8))


def switch() -> t.PreTrainedModel:
    config = t.SwitchTransformersConfig(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )
    return t.SwitchTransformersForConditionalGeneration(config)


ODD = {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1}

TINY: dict[str, TinyModel] = {
    "llama": TinyModel(llama, text_inputs, True),
    "llama-tied": TinyModel(lambda: llama(tie_word_embeddings=True), text_inputs, True),
    "llama-odd": TinyModel(lambda: llama(vocab_size=101, **ODD), text_inputs, True),
    "qwen3": TinyModel(lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=16)), text_inputs, True),
    "mixtral": TinyModel(mixtral, text_inputs, True),
    "qwen3-moe": TinyModel(qwen3_moe, text_inputs, True),
    "gpt-oss": TinyModel(gpt_oss, text_inputs, True),
    "llama4": TinyModel(llama4, text_inputs, True),
    "deepseek-v3": TinyModel(deepseek_v3, text_inputs, True),
    "qwen3-next": TinyModel(qwen3_next, text_inputs, True),
    "olmo": TinyModel(olmo, text_inputs, True),
    "gpt2": TinyModel(gpt2, text_inputs, True),
    "opt": TinyModel(opt, text_inputs, True),
    "gemma3": TinyModel(gemma3, text_inputs, True),
    "gemma4": TinyModel(gemma4, text_inputs, True),
    "bert": TinyModel(bert, text_inputs),
    "bert-mlm": TinyModel(bert_mlm, text_inputs),
    "bart": TinyModel(bart, seq2seq_inputs, True),
    "t5": TinyModel(t5, seq2seq_inputs, True),
    "vit": TinyModel(vit, image_inputs),
    "whisper": TinyModel(whisper, audio_inputs, True),
    "falcon": TinyModel(falcon, text_inputs, True),
    "marian": TinyModel(marian, seq2seq_inputs, True),
    "mamba": TinyModel(mamba, text_inputs, coverage=0.4),
    "switch": TinyModel(switch, seq2seq_inputs, coverage=0.6),
    "llava": TinyModel(llava, image_text_inputs, True),
}


def build(name: str) -> t.PreTrainedModel:
    """The model ``name`` with seed 0 and weights large enough that rounding them shows in the output."""
    torch.manual_seed(0)
    model = TINY[name].build().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and key not in (model._keys_to_ignore_on_save or ()):
                parameter.mul_(4)
    return model


def output(model: t.PreTrainedModel, name: str) -> Tensor:
    """Logits, or the last hidden state, on the model's own inputs."""
    dtype = model.dtype
    batch = {key: v.to(dtype) if v.is_floating_point() else v for key, v in TINY[name].inputs().items()}
    with torch.no_grad():
        out = model(**batch)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def generated(model: t.PreTrainedModel, name: str) -> Tensor:
    """Six greedy tokens."""
    batch = {k: v for k, v in TINY[name].inputs().items() if not k.startswith("decoder")}
    batch = {key: v.to(model.dtype) if v.is_floating_point() else v for key, v in batch.items()}
    return model.generate(**batch, max_new_tokens=6, do_sample=False)

"""Tiny random models of many architectures, and what of each is pruned: see `FAMILIES`.

`pruned` are names of layers relative to a decoder block, `dense` those of matrices in blocks that stay dense (all
experts under one name), with "*" for numbers. A family without `pruned` is refused; `served` says whether vLLM has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from tests import models

VOCABULARY = models.VOCABULARY

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": models.MAX_TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GQA: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_WIDE: dict[str, Any] = {**_GQA, "head_dim": 16}
_MOE: dict[str, Any] = {**_GQA, "num_experts_per_tok": 2}
_OLD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": models.MAX_TOKENS,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}
_FALCON = {key: size for key, size in _SIZES.items() if key != "intermediate_size"}
_LATENT: dict[str, Any] = {
    **_MOE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = tuple(name.replace("mlp.", "mlp.shared_experts.") for name in _FFN)


@dataclass(frozen=True)
class Family:
    """One architecture: how to make its configuration, and what of it is pruned and what is not."""

    config: Callable[[], Any]
    pruned: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    served: bool = True
    make: Callable[[Any], nn.Module] = field(default=transformers.AutoModelForCausalLM.from_config)

    def save(self, directory: Path, **options: Any) -> Path:
        """Write a random model with its tokenizer as a Hugging Face directory."""
        models.randomise(self.make(self.config()), **options).save_pretrained(directory)  # type: ignore[operator]
        models.tokenizer().save_pretrained(directory)
        return directory


def _config(name: str, base: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**base, **changes})


def _gemma3_with_vision() -> Any:
    text = {**_WIDE, "sliding_window": 16, "model_type": "gemma3_text"}
    vision = {**_VISION, "model_type": "siglip_vision_model"}
    tokens = {"image_token_index": 310, "boi_token_index": 311, "eoi_token_index": 312}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def _llava() -> Any:
    vision = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    text = {**_GQA, "model_type": "llama"}
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=310)


FAMILIES: dict[str, Family] = {
    "llama": Family(_config("Llama", _GQA), (*_ATTENTION, *_FFN)),
    "qwen2": Family(_config("Qwen2", _GQA), (*_ATTENTION, *_FFN)),
    "qwen3": Family(_config("Qwen3", _WIDE), (*_ATTENTION, *_FFN)),
    "gemma2": Family(_config("Gemma2", _WIDE, sliding_window=16), (*_ATTENTION, *_FFN)),
    "gemma3_text": Family(_config("Gemma3Text", _WIDE, sliding_window=16), (*_ATTENTION, *_FFN)),
    "gemma3_vision": Family(
        _gemma3_with_vision, (*_ATTENTION, *_FFN), make=transformers.Gemma3ForConditionalGeneration
    ),
    "mistral": Family(_config("Mistral", _GQA, sliding_window=16), (*_ATTENTION, *_FFN)),
    "phi3": Family(
        _config("Phi3", _GQA), ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "gpt_neox": Family(
        _config("GPTNeoX", _SIZES),
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gpt2": Family(_config("GPT2", _OLD)),
    "opt": Family(
        _config("OPT", _SIZES, ffn_dim=96, word_embed_proj_dim=64),
        (*_QKV, "self_attn.out_proj", "fc1", "fc2"),
    ),
    "falcon": Family(
        _config("Falcon", _FALCON),
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "falcon_new": Family(
        _config("Falcon", _FALCON, num_kv_heads=2, new_decoder_architecture=True),
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "starcoder2": Family(_config("Starcoder2", _GQA), (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
    "cohere": Family(_config("Cohere", _GQA), (*_ATTENTION, *_FFN)),
    "olmo2": Family(_config("Olmo2", _GQA), (*_ATTENTION, *_FFN)),
    "granite": Family(_config("Granite", _GQA), (*_ATTENTION, *_FFN)),
    "glm4": Family(_config("Glm4", _WIDE), (*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")),
    "lfm2": Family(  # states a width of 144, makes it 96
        _config("Lfm2", _GQA, intermediate_size=144, block_multiple_of=8, layer_types=["full_attention"] * 2),
        (*_QKV, "self_attn.out_proj", *(f"feed_forward.w{number}" for number in (1, 2, 3))),
    ),
    "gptj": Family(
        _config("GPTJ", _OLD, rotary_dim=8),
        ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    ),
    "mpt": Family(
        _config("Mpt", {}, vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=models.MAX_TOKENS),
        ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
        served=False,
    ),
    "mixtral": Family(
        _config("Mixtral", _MOE, num_local_experts=4),
        _ATTENTION,
        ("block_sparse_moe.experts", "block_sparse_moe.gate"),
    ),
    "qwen2_moe": Family(
        _config("Qwen2Moe", _MOE, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64),
        (*_ATTENTION, *(name.replace("mlp.", "mlp.shared_expert.") for name in _FFN)),
        ("mlp.experts", "mlp.gate", "mlp.shared_expert_gate"),
    ),
    "qwen3_moe": Family(
        _config("Qwen3Moe", _MOE, head_dim=16, num_experts=4, moe_intermediate_size=32),
        _ATTENTION,
        ("mlp.experts", "mlp.gate"),
    ),
    "deepseek_v2": Family(
        _config("DeepseekV2", _LATENT, q_lora_rank=None),
        ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj", *_FFN, *_SHARED),
        ("mlp.experts", "mlp.gate", "self_attn.kv_b_proj"),
    ),
    "deepseek_v3": Family(
        _config("DeepseekV3", _LATENT, q_lora_rank=32),
        (
            *(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")),
            *(*_FFN, *_SHARED),
        ),
        ("mlp.experts", "mlp.gate", "self_attn.kv_b_proj"),
    ),
    "phimoe": Family(
        _config("Phimoe", _MOE, num_local_experts=4),
        _ATTENTION,
        ("block_sparse_moe.experts", "block_sparse_moe.gate"),
    ),
    "gpt_oss": Family(
        _config("GptOss", _MOE, head_dim=16, num_local_experts=4, sliding_window=16),
        _ATTENTION,
        ("mlp.experts", "mlp.router"),
    ),
    "granite_moe": Family(
        _config("GraniteMoe", _MOE, num_local_experts=4),
        _ATTENTION,
        ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear", "block_sparse_moe.router.layer"),
    ),
    "llava": Family(_llava, make=transformers.LlavaForConditionalGeneration),
}

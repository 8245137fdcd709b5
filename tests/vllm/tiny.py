"""Tiny random models of every family that transformers and vLLM both know, for finding out what vLLM does with them.

A family's configuration class is asked which settings it has, and those that make a model large get small values. What
a family wants beyond that is in `EXTRA`; where its layers depend on the configuration, it has several variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import models

MAX_WEIGHTS = 30_000_000

SMALL: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "ffn_dim": 192,
    "n_inner": 192,
    "rotary_dim": 16,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "sliding_window": 16,
    "query_pre_attn_scalar": 32,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
    "num_nextn_predict_layers": 0,
    "vocab_size_per_layer_input": models.VOCABULARY,
    "hidden_size_per_layer_input": 32,
    # vLLM's attention with a latent cache (MLA) has kernels of these sizes only
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 128),
    # and linear attention goes from these heads to its state
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),
}

TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
"""What sees or hears; fewer blocks than the decoder has."""

_OPTIONAL = ("q_lora_rank", "sliding_window")
_NO_Q_LORA = {"q_lora_rank": None}
_EVERY_OTHER = ["sliding_attention", "full_attention"]
_LINEAR_TOO = ["linear_attention", "full_attention"]
EXTRA: dict[str, list[dict[str, Any]]] = {
    "AfmoeForCausalLM": [
        {"score_func": "sigmoid", "route_norm": True, "num_dense_layers": 1, "n_group": 1, "topk_group": 1}
    ],
    "DeepseekV2ForCausalLM": [{}, _NO_Q_LORA],
    "DeepseekV3ForCausalLM": [{"topk_method": "noaux_tc"}, {"topk_method": "noaux_tc", **_NO_Q_LORA}],
    "FalconForCausalLM": [{}, {"new_decoder_architecture": True, "num_kv_heads": 2}],
    "Gemma3ForConditionalGeneration": [{"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}],
    "Gemma3nForCausalLM": [
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": _EVERY_OTHER * 2,
            "vocab_size_per_layer_input": 320,
        }
    ],
    "Glm4MoeForCausalLM": [{"head_dim": 32}],
    "Glm4MoeLiteForCausalLM": [{"first_k_dense_replace": 1}],
    "GraniteMoeHybridForCausalLM": [{"layer_types": _LINEAR_TOO}],
    "HYV3ForCausalLM": [{"first_k_dense_replace": 1, "expert_hidden_dim": 64}],
    "JambaForCausalLM": [{"attn_layer_period": 2, "attn_layer_offset": 1}],
    "Lfm2ForCausalLM": [{"block_dim": 128, "conv_dim": 128, "layer_types": ["conv", "full_attention"]}],
    "Lfm2MoeForCausalLM": [{"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}],
    "Llama4ForCausalLM": [{"num_experts_per_tok": 1}],
    "Mamba2ForCausalLM": [{"num_heads": 8, "head_dim": 32}],
    "MiniMaxM2ForCausalLM": [{"rotary_dim": 16, "scoring_func": "sigmoid"}],
    "NemotronHForCausalLM": [{"layers_block_type": ["linear_attention", "full_attention", "mlp"]}],
    "Qwen2MoeForCausalLM": [{"mlp_only_layers": [0]}],
    "Qwen3MoeForCausalLM": [{"mlp_only_layers": [0]}],
    "Qwen3NextForCausalLM": [{"layer_types": _LINEAR_TOO, "mlp_only_layers": [0]}],
    "Qwen3_5ForCausalLM": [{"layer_types": _LINEAR_TOO}],
    "Qwen3_5MoeForCausalLM": [{"layer_types": _LINEAR_TOO}],
}


def architectures() -> set[str]:
    """Every causal language model that transformers has."""
    return {name for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(entry)}


def configs(architecture: str) -> list[PretrainedConfig]:
    """Small configurations of a family, one for each of its variants; `LookupError` if transformers has no such one."""
    wanted = architecture.lower()  # PhiMoE's is not spelled alike
    entries = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    kinds = [kind for kind, entry in entries if wanted in map(str.lower, _names(entry))]
    if not kinds:
        raise LookupError(f"transformers has no causal language model {architecture}")
    kind = next((kind for kind in kinds if kind.endswith("_text")), kinds[0])
    return [_config(kind, architecture, changes) for changes in EXTRA.get(architecture, [{}])]


def save(config: PretrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of a configuration, written as an ordinary Hugging Face directory; `ValueError` if it is large."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if weights > MAX_WEIGHTS:
        raise ValueError(f"{config.architectures}: {weights} weights with a small configuration")
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh model's outputs are so small that a mistake would not show
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    model.to(dtype).save_pretrained(directory)
    return model


def _config(kind: str, architecture: str, changes: dict[str, Any]) -> PretrainedConfig:
    cls = CONFIG_MAPPING[kind]
    config: PretrainedConfig = cls(**{**_small(cls, SMALL), **changes}, architectures=[architecture])
    return config


def _small(cls: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Small values of the settings that a configuration class has; of a model that also sees, of each part of it."""
    default = cls()
    parts = {name: type(getattr(default, name)) for name in cls.sub_configs if getattr(default, name) is not None}
    if "text_config" in parts:
        return {name: _small(part, SMALL if name == "text_config" else TOWER) for name, part in parts.items()}
    fields = vars(cls).get("attribute_map", {})
    small = {}
    for name, value in sizes.items():
        known = _has(default, name) and not isinstance(getattr(cls, fields.get(name, name), None), property)
        if known and not (name in _OPTIONAL and getattr(default, name) is None):
            small[name] = value
    if "kv_lora_rank" in small:
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
        small.pop("head_dim", None)
    return small


def _has(config: PretrainedConfig, name: str) -> bool:
    """Whether a configuration has a setting, be it one for each layer, which cannot be read as one."""
    try:
        return hasattr(config, name)
    except RuntimeError:
        return True


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry

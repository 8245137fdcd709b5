"""Tiny GGUF files: a model of `tests.models` as llama.cpp's converter would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

from sparse_serve.bench import gguf_model
from tests import models

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def save(
    path: Path, changes: dict[str, Any] | None = None, without: str = "", words: str = "gpt-2"
) -> dict[str, torch.Tensor]:
    """Write the tiny Llama to `path`, matrices in Q8_0; returns what its weights are after that, by Hugging Face name.

    `changes` are keys of the header that are set last; a tensor whose name holds `without` is left out. `words`: the
    name of the rules by which a text is cut into words.
    """
    llama = models.build("llama")
    writer = GGUFWriter(path, "llama")
    _add_header(writer, llama.config, words)
    for key, value in (changes or {}).items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](key, value)
    kept = {}
    for name, weight in llama.state_dict().items():
        values = weight.numpy()
        stored = gguf_model.ordered(values, llama.config.to_dict(), name)
        if weight.ndim == 2:
            packed = quantize(stored, GGMLQuantizationType.Q8_0)
            values = _unpermuted(dequantize(packed, GGMLQuantizationType.Q8_0), llama.config, name)
        kept[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        if without and without in name:
            continue
        if weight.ndim == 2:
            writer.add_tensor(gguf_model.tensor_name(name), packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_model.tensor_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _add_header(writer: GGUFWriter, config: Any, words: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    inner = json.loads(models.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if token in (models.BOS, models.EOS) else TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)


def _heads(config: Any, name: str) -> int:
    """Heads of a projection whose rows llama.cpp keeps in another order; 0 for any other tensor."""
    return {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split(".")[-2][0], 0) * (
        "self_attn" in name
    )


def _unpermuted(values: np.ndarray, config: Any, name: str) -> np.ndarray:
    heads = _heads(config, name)
    if not heads:
        return values
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)

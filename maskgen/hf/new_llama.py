"""Make a Llama from nothing and save it as an ordinary Hugging Face directory.

The rest of maskgen starts from models that exist; only the demo needs a new one. What is written here is what anybody
else would write: `config.json`, `generation_config.json`, one safetensors file, `tokenizer.json`,
`tokenizer_config.json` and a chat template, so that every loader takes it without special treatment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskgen.core.errors import ModelError


def new_llama(**config: Any) -> nn.Module:
    """A randomly initialised float32 Llama; `config` are the fields of `LlamaConfig`.

    Randomness is torch's global generator: seed it first. Raises `ModelError` when the fields contradict each other.
    """
    try:
        return LlamaForCausalLM(LlamaConfig(**config))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = error.__cause__ or error
        raise ModelError(f"no Llama can be made from {config}: {reason}") from error


def save(model: nn.Module, tokenizer_json: str, out_dir: Path, chat_template: str | None = None) -> None:
    """Write `model` in bfloat16, and its tokenizer, to `out_dir` (made if missing); `model` becomes bfloat16 too.

    `tokenizer_json` is the text of a `tokenizers` file. Which of its tokens are BOS, EOS and padding is taken from the
    model's config, so the two cannot disagree. Raises `ModelError` when such an id is not in the tokenizer.
    """
    inner = Tokenizer.from_str(tokenizer_json)
    llama = _checked(model)
    special = {f"{role}_token": _token(inner, llama.config, role) for role in ("bos", "eos", "pad")}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=llama.config.max_position_embeddings, **special
    )
    wrapped.chat_template = chat_template
    llama.to(torch.bfloat16).save_pretrained(out_dir)
    wrapped.save_pretrained(out_dir)


def _checked(model: nn.Module) -> LlamaForCausalLM:
    if not isinstance(model, LlamaForCausalLM):
        raise ModelError(f"a {type(model).__name__} cannot be saved here; make the model with new_llama")
    return model


def _token(tokenizer: Tokenizer, config: Any, role: str) -> str:
    token_id = getattr(config, f"{role}_token_id")
    token = None if token_id is None else tokenizer.id_to_token(token_id)
    if token is None:
        raise ModelError(f"{role}_token_id is {token_id}, which the tokenizer does not have; pass one that it has")
    return str(token)

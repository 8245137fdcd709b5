"""Hugging Face models and tokenizers: find a directory, load it, and ask what it can read.

This file and `loader` are the only ones that read models with transformers; `planning` decides what of them is pruned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from maskgen.core.checkpoint import is_sparse_checkpoint
from maskgen.core.companions import SNAPSHOT_PATTERNS
from maskgen.core.errors import DataError, FormatError, ModelError, clip
from maskgen.core.failures import machine_failure
from maskgen.hf import gguf, loader
from maskgen.hf.errors import HF_ERRORS, clear_errors, first_line

logger = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
"""Names of files one of which a tokenizer has, but for those that work on bytes."""


def resolve(source: str, tell: Callable[[str], None] = lambda what: None) -> Path:
    """The directory of a model: `source` itself, the snapshot of a hub id (downloaded when not cached), or what a GGUF
    file was converted to (`maskgen.hf.gguf`).

    Only safetensors and tokenizer files are fetched, never code. `tell` is called with what begins, before a file is
    converted. Raises `ModelError`, and what the conversion does.
    """
    path = Path(source)
    if gguf.is_gguf(path):
        return gguf.converted(path, tell)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            raise ModelError(f"{source}: a directory of GGUF files without a config.json; give one file: {files[0]}")
        return path
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"{source}: no such file")
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(
            f"{source}: not a directory; give a Hugging Face model directory, a GGUF file, or a hub id like org/name"
        )
    try:
        return Path(snapshot_download(source, allow_patterns=list(SNAPSHOT_PATTERNS)))
    except (OSError, ValueError) as error:
        if (failure := machine_failure(error)) is not None:
            raise failure from None
        raise ModelError(
            f"{source}: neither a directory nor a hub model that can be downloaded: {first_line(error)}"
        ) from None


def load(path: Path, dtype: str | torch.dtype = "auto", device: str = "cpu") -> nn.Module:
    """Load a causal language model for inference, dense or sparse (decompressed). "auto" keeps the stored dtype.

    Code shipped with a model is never run. Raises `ModelError` when it cannot be loaded or when any weight would be
    missing, `FormatError` when a sparse checkpoint is damaged.
    """
    loader.register()
    path = Path(path)
    config = _config(path)
    if getattr(config, "quantization_config", None) is not None and not is_sparse_checkpoint(path):
        raise ModelError(f"{path}: already quantized; start from the model in bfloat16, float16 or float32")
    with clear_errors(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise ModelError(f"{path}: {len(info[kind])} {kind.replace('_', ' ')}, such as {sorted(info[kind])[0]}")
    if info["unexpected_keys"]:
        logger.warning("%s: tensors the model does not use: %s", path, sorted(info["unexpected_keys"]))
    result: nn.Module = model.requires_grad_(False).eval().to(device)
    return result


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer; `ModelError` when the directory holds none."""
    with clear_errors(path, "no usable tokenizer", "; download the model's tokenizer again"):
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except HF_ERRORS:
            if any(any(path.glob(name)) for name in _VOCABULARIES):
                raise
            raise ModelError(
                f"{path}: no usable tokenizer: neither tokenizer.json nor another vocabulary is there; copy the files "
                "of the model's tokenizer beside its weights, or download the model again"
            ) from None


def outline(path: Path) -> nn.Module:
    """The model of a directory on torch's meta device: every module and shape, made from its config alone.

    Raises `ModelError` when transformers cannot make such a model.
    """
    config = _config(path)
    with clear_errors(path), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def quiet() -> None:
    """Turn off progress bars and warnings of transformers, for command lines with an output of their own."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def max_tokens(model: nn.Module) -> int | None:
    """The most tokens a sequence may have for this model; None if its config does not state a limit."""
    return _context_tokens(model.config)


def stored_max_tokens(path: Path) -> int | None:
    """`max_tokens` of a model directory, from its config alone; `ModelError` when transformers cannot read that."""
    return _context_tokens(_config(path))


def check_ids(ids: Tensor, vocabulary: Mapping[str, int], path: Path) -> None:
    """Raise `DataError` if `ids`, of any shape, hold a token that the embedding of the model in `path` has no row for.

    `vocabulary` are the tokens of its tokenizer, which may be more than the model has rows for, as long as the text has
    none of these.
    """
    rows = _config(path).get_text_config(decoder=True).vocab_size
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= rows:
        token = next((token for token, number in vocabulary.items() if number == largest), "unknown")
        raise DataError(
            f"{path}: the text has token {largest} ({clip(token)}), but the model's embedding has {rows} rows; use the "
            "tokenizer that the model was trained with, or give the model rows for the new tokens "
            "(resize_token_embeddings) and train them"
        )


def _config(path: Path) -> Any:
    """A configuration that `AutoModelForCausalLM` has a class for."""
    with clear_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    stated = getattr(config, "architectures", None)
    if stated is not None and not (isinstance(stated, list) and all(isinstance(name, str) for name in stated)):
        raise FormatError(
            f"{path / 'config.json'}: architectures is {clip(stated)}, expected a list of names; download it again"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        kind = " ".join(getattr(config, "architectures", None) or [config.model_type])
        raise ModelError(
            f"{path}: {kind} is not supported: maskgen prunes models that transformers' AutoModelForCausalLM loads, "
            f"and it has no class for this one; {_alternative(config)}"
        )
    _check_kind(path, config)
    return config


def _alternative(config: Any) -> str:
    """What to start from in place of a model without a class: its language model, if it is made of one and others."""
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in AutoModelForCausalLM._model_mapping:
        return "start from a model that predicts the next token, such as one of the Llama, Qwen, Gemma or Mistral kind"
    return (
        f"its language model alone is supported: save that as a {' or '.join(_causal_classes(type(text)))}, with the "
        "tokenizer, and start from there; what is served then reads text only"
    )


def _causal_classes(config_class: type) -> list[str]:
    """Names of the classes for causal language models of a kind."""
    classes = AutoModelForCausalLM._model_mapping[config_class]
    return [kind.__name__ for kind in (classes if isinstance(classes, tuple | list) else [classes])]


def _check_kind(path: Path, config: Any) -> None:
    """`ModelError` for what another class of transformers wrote: an encoder, say, which may have a class for causal
    language models, too, that would make up what is missing."""
    causal = _causal_classes(type(config))
    stated = getattr(config, "architectures", None) or []
    if not set(stated) & set(causal) and any(name in dir(transformers) for name in stated):
        raise ModelError(
            f"{path}: a {' '.join(stated)}, expected a causal language model, which is a {' or '.join(causal)} of this "
            "kind; start from the model that predicts the next token"
        )


def _context_tokens(config: Any) -> int | None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None

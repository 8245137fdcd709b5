"""Tiny random models in every shape the project must handle, saved as ordinary Hugging Face directories.

Weights are larger than a fresh initialisation's and biases and norms are random too, so that a bug that drops, swaps or
rescales any of them changes the outputs. Everything is seeded; nothing is downloaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from maskgen.core.checkpoint import read_headers
from maskgen.core.config import SparseConfig
from maskgen.core.correction import CorrectionConfig
from maskgen.core.digest import digest_weights
from maskgen.core.mask import MaskSet
from maskgen.core.packed import Correction, PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import compress, compress_masks

VOCABULARY = 320
LAYERS = 3
MAX_TOKENS = 128
BOS, EOS = "<s>", "</s>"

TEXT = " ".join(
    f"On day {day} the {('red', 'old', 'quick', 'tall', 'dim')[day % 5]} "
    f"{('fox', 'boat', 'lamp', 'child', 'river', 'clock', 'cat')[day % 7]} "
    f"{('saw', 'left', 'found', 'wrote about')[day % 4]} {day * day} "
    f"{('stones', 'letters', 'birds')[day % 3]}, and nobody {('minded', 'knew')[day % 2]}."
    for day in range(600)
)
"""About 30,000 characters that a byte-level tokenizer finds neither random nor constant."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GQA: dict[str, Any] = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": False}


def _llama(**changes: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**_GQA, **changes}))


def _qwen2(**changes: Any) -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**{**_GQA, "tie_word_embeddings": True, **changes}))


def _qwen3(**changes: Any) -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**{**_GQA, "head_dim": 16, **changes}))


def _mistral(**changes: Any) -> nn.Module:
    return MistralForCausalLM(MistralConfig(**{**_GQA, "sliding_window": 16, **changes}))


def _opt(**changes: Any) -> nn.Module:
    return OPTForCausalLM(OPTConfig(**{**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, **changes}))


def _gpt_neox(**changes: Any) -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**_COMMON, "intermediate_size": 96, **changes}))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "llama": _llama,
    "llama_tied": lambda **changes: _llama(**{"tie_word_embeddings": True, **changes}),
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random model of one of `BUILDERS`; `changes` override its config."""
    return randomise(BUILDERS[kind](**changes), seed, dtype)


def randomise(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fill a model with seeded random numbers: weights larger than an initialisation's, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.12)
            else:
                parameter.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else 1.0))
    return model.to(dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over any text, trained on `TEXT`; `BOS` is id 0 and `EOS` id 1."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), bos_token=BOS, eos_token=EOS)


@functools.cache
def _trained() -> str:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    return str(inner.to_str())


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of Gemma 3: BOS (id 2) in front of every text by itself, spaces as "▁", bytes for rare characters.

    Its chat template begins with BOS, too. It has `VOCABULARY` ids or fewer.
    """
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    spaces = normalizers.Replace(" ", "▁")
    letters = sorted(set(spaces.normalize_str(TEXT)))
    pieces = [
        *special.values(),
        "<start_of_turn>",
        "<end_of_turn>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = spaces
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"], **special
    )
    made.chat_template = (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return made


def save(
    kind: str,
    directory: Path,
    max_shard_size: str = "5GB",
    tokens: Callable[[], PreTrainedTokenizerFast] = tokenizer,
    **options: Any,
) -> Path:
    """Build a model and write it with a tokenizer as a Hugging Face directory."""
    build(kind, **options).save_pretrained(directory, max_shard_size=max_shard_size)
    tokens().save_pretrained(directory)
    return directory


def magnitude_masks(dense_dir: Path, pattern: NMPattern) -> MaskSet:
    """Magnitude masks for every linear layer of the blocks, made without maskgen's own driver."""
    masks = {}
    for name, header in read_headers(dense_dir).items():
        if re.search(r"layers\.\d+\..*\.weight$", name) and len(header.shape) == 2:
            with safe_open(header.path, framework="pt") as file:
                weight = file.get_tensor(name).float()
            masks[name.removesuffix(".weight")] = pattern.mask_from_scores(weight.abs())
    return MaskSet.from_masks(pattern, masks, digest_weights(dense_dir), "sha256:" + "0" * 64)


def save_sparse(dense_dir: Path, directory: Path, pattern: str = "2:4", shard_bytes: int = 5_000_000_000) -> MaskSet:
    """Compress a dense directory with magnitude masks; returns the masks."""
    masks = magnitude_masks(dense_dir, NMPattern.parse(pattern))
    compress_masks(dense_dir, masks, directory, ("lm_head",), shard_bytes)
    return masks


def save_corrected(
    dense_dir: Path, directory: Path, form: CorrectionConfig | None, values: str = "float", group: int | None = None
) -> MaskSet:
    """Compress with magnitude masks, random corrections of one form and `values` of any kind; returns the masks."""
    masks, generator = magnitude_masks(dense_dir, NMPattern(2, 4)), torch.Generator().manual_seed(1)
    ignored = ("lm_head",)
    digests = (masks.digest(), masks.recipe_digest)
    config = SparseConfig(
        masks.pattern, masks.names, ignored, *digests, "tiny", masks.base_digest, values, form, group=group
    )

    def correction(shape: torch.Size, name: str) -> Correction | None:
        if form is None:
            return None
        out_shape, pool_shape = form.shapes(*shape, name)
        pool = None if pool_shape is None else torch.randn(pool_shape, generator=generator) * 0.3
        return Correction(torch.randn(out_shape, generator=generator) * 0.05, pool)

    def pack(name: str, weight_OI: torch.Tensor) -> StoredLayer:
        packed = PackedTensor.pack(weight_OI, masks.mask(name), masks.pattern, name)
        return StoredLayer(packed, correction(weight_OI.shape, name))

    compress(dense_dir, config, pack, directory)
    return masks

"""Sizes in `config.json` against the tensors that are stored: an engine allocates what the configuration claims.

Three kinds of keys. A *dimension* (`hidden_size`) is the length of some stored tensor along some axis. A *share* of a
dimension (heads, the size of one, the size of one expert) is at most the largest stored dimension, and heads times
their size at most four times it. A *count* of experts is a dimension too, of the router, or at most the number of
tensors. The bounds are loose where architectures differ (grouped heads, latent attention, fused projections), and
tight enough that a small file cannot ask for a large machine. The section `text_config`, where models that also see or
hear keep their decoder, is held to the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgen.core.errors import FormatError, clip
from maskgen.core.mask import BITMASK_SUFFIX

MAX_CONTEXT_TOKENS = 1 << 27

_DIMENSIONS = ("hidden_size", "intermediate_size", "ffn_dim", "vocab_size")
_SHARES = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts_per_tok",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts")
_HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")
_HEAD_SIZES = ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_MOST_HEADS = 4
"""Heads times their size over the largest dimension; stored projections have that product as a dimension."""

_MOST_UNUSED = 16
"""`intermediate_size` over `hidden_size` where no layer has that size; real models have up to 7."""

_BLOCK_INDEX = re.compile(r"\.([0-9]+)\.")


def check_dimensions(path: Path, hf_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `FormatError` if `config.json` claims a larger model than the stored tensors, given by name and shape."""
    sizes = {size for shape in shapes.values() for size in shape}
    sizes |= {shape[1] * 8 for name, shape in shapes.items() if name.endswith(BITMASK_SUFFIX) and len(shape) == 2}
    blocks = {match[1] for name in shapes if (match := _BLOCK_INDEX.search(name))}
    for where, section in _sections(path, hf_config):
        _Section(where, section, frozenset(sizes), len(shapes), len(blocks)).check()


def _sections(path: Path, hf_config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    where, section = f"{path}: config.json: ", hf_config
    yield where, section
    for _ in range(2):
        nested = section.get("text_config")
        if nested is None:
            return
        if not isinstance(nested, dict):
            raise FormatError(f"{where}text_config {clip(nested)}, expected an object")
        where, section = f"{where}text_config: ", nested
        yield where, section
    if "text_config" in section:
        raise FormatError(f"{where}another text_config; they may not be nested this deeply")


@dataclass(frozen=True)
class _Section:
    """One object of sizes, and what is stored: the dimensions, and how many tensors and blocks."""

    where: str
    config: Mapping[str, Any]
    sizes: frozenset[int]
    tensors: int
    blocks: int

    def check(self) -> None:
        largest = max(self.sizes, default=0)
        for key in _DIMENSIONS:
            self._check_dimension(key)
        for key in _SHARES:
            least = 1 if key in (*_HEAD_COUNTS, "head_dim") else 0
            self._check_range(key, least, largest, "the largest dimension of a stored tensor")
        self._check_heads(largest)
        for key in _EXPERTS:
            count = self.config.get(key)
            if type(count) is not int or count not in self.sizes:
                self._check_range(key, 0, self.tensors, "the number of stored tensors, and not a dimension of any")
        self._check_range("max_position_embeddings", 1, MAX_CONTEXT_TOKENS, "the most this format allows")
        layers = self.config.get("num_hidden_layers")
        if layers is not None and (type(layers) is not int or not 1 <= layers <= self.blocks):
            raise FormatError(
                f"{self.where}num_hidden_layers {clip(layers)}, but tensors of {self.blocks} blocks are stored"
            )

    def _check_dimension(self, key: str) -> None:
        size = self.config.get(key)
        if size is None or (type(size) is int and (size in self.sizes or self._may_be_unused(key, size))):
            return
        raise FormatError(f"{self.where}{key} {clip(size)} is not a dimension of any stored tensor")

    def _may_be_unused(self, key: str, size: int) -> bool:
        """Mixtures of experts state the size of a dense layer that they do not have, and LFM2 one that it shrinks."""
        adjusts = self.config.get("block_auto_adjust_ff_dim") is True
        if key != "intermediate_size" or (self.config.get("moe_intermediate_size") is None and not adjusts):
            return False
        hidden = self.config.get("hidden_size")
        return type(hidden) is int and 1 <= size <= _MOST_UNUSED * hidden

    def _check_range(self, key: str, least: int, most: int, what: str) -> None:
        if self.config.get(key) is not None:
            for value in self._per_layer(key):
                if type(value) is not int or not least <= value <= most:
                    raise FormatError(f"{self.where}{key} {clip(value)}, expected {least} to {most} ({what})")

    def _check_heads(self, largest: int) -> None:
        for count in _HEAD_COUNTS:
            for size in _HEAD_SIZES:
                heads, width = max(self._per_layer(count), default=0), max(self._per_layer(size), default=0)
                if heads * width > _MOST_HEADS * largest:
                    raise FormatError(
                        f"{self.where}{count} {heads} times {size} {width} is more than {_MOST_HEADS} times {largest}, "
                        "the largest dimension of a stored tensor"
                    )

    def _per_layer(self, key: str) -> list[Any]:
        """The value as a list: some architectures give one number for each layer."""
        value = self.config.get(key)
        if value is None:
            return []
        return value if isinstance(value, list) else [value]

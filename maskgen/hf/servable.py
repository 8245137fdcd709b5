"""What vLLM serves: the table `vllm_models.json`, made from vLLM's own list of models, and questions about it.

    {"vllm": "0.32.0",
     "architectures": {"LlamaForCausalLM": {"fused": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
                                            "sparse": ["self_attn.q_proj", ...], "dense": [...]},
                       "SomeOther": null}}

An architecture that is not a key is one that vLLM does not have. null: vLLM has it, but which of its layers can be
served packed is not known. Names are those of the checkpoint, relative to a decoder block, with "*" for the number of
an expert. "sparse" are the layers that vLLM asks its quantization method about, "dense" those it does not, and "fused"
maps a layer of vLLM to the checkpoint's layers it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from maskgen.core.errors import FormatError, ModelError, clip

TABLE = "vllm_models.json"

USUAL_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that engines serve as one layer, where an architecture is not in the table."""


@dataclass(frozen=True)
class Served:
    """The layers of one architecture: those that vLLM can serve packed, and the groups it serves as one layer."""

    sparse: frozenset[str]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Table:
    """`vllm` is the version the table is of; an architecture that vLLM has, but of which no more is known, is None."""

    vllm: str
    architectures: Mapping[str, Served | None]

    @classmethod
    def from_dict(cls, value: Any) -> Table:
        """Read the JSON object; `FormatError` on anything that is not exactly of this form."""
        where = TABLE
        if not isinstance(value, dict) or set(value) != {"vllm", "architectures"} or not isinstance(value["vllm"], str):
            raise FormatError(f"{where}: expected an object with the keys vllm and architectures, found {clip(value)}")
        entries = value["architectures"]
        if not isinstance(entries, dict) or not entries:
            raise FormatError(f"{where}: architectures {clip(entries)}, expected an object that is not empty")
        return cls(value["vllm"], {name: _served(f"{where}: {name}", entry) for name, entry in entries.items()})

    def find(self, architectures: Sequence[str]) -> Served | None:
        """What is known of the first of `architectures` that vLLM has; None if that is nothing, or it has none."""
        return next((self.architectures[name] for name in architectures if name in self.architectures), None)

    def has(self, architectures: Sequence[str]) -> bool:
        """Whether vLLM has one of `architectures`."""
        return any(name in self.architectures for name in architectures)

    def check(self, architectures: Sequence[str]) -> None:
        """Raise `ModelError` for a model that vLLM does not have."""
        if not self.has(architectures):
            raise ModelError(
                f"{' or '.join(architectures)}: vLLM {self.vllm} has no such model, so the result could not be served; "
                "to go on for use in transformers only, set `allow_unserved`"
            )


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names in `config.json` by which engines find the class of a model."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


@cache
def table() -> Table:
    """The table that is shipped with the package."""
    return Table.from_dict(json.loads((resources.files("maskgen.hf") / TABLE).read_text("utf-8")))


def _served(where: str, entry: Any) -> Served | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) != {"fused", "sparse", "dense"}:
        raise FormatError(f"{where}: expected null or an object with fused, sparse and dense, found {clip(entry)}")
    if not isinstance(entry["fused"], dict):
        raise FormatError(f"{where}: fused {clip(entry['fused'])}, expected an object")
    for key, names in [*entry["fused"].items(), *((key, entry[key]) for key in ("sparse", "dense"))]:
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise FormatError(f"{where}: {key} {clip(names)}, expected a list of names")
    if both := sorted(set(entry["sparse"]) & set(entry["dense"])):
        raise FormatError(f"{where}: {both[0]!r} is both sparse and dense")
    return Served(frozenset(entry["sparse"]), tuple(map(tuple, entry["fused"].values())))

"""The manifest of a sparse checkpoint: the section `quantization_config` of its `config.json`, read strictly.

The section has that name because transformers and vLLM look there for a `quant_method`. A checkpoint may come from
anywhere: unknown keys and versions are errors, names are plain dotted identifiers, and nothing in the section can name
code, a file to open, or an amount of memory.

Version 3 has the digest of every shard; version 2, which is still read, has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskgen.core.correction import CorrectionConfig, read_correction
from maskgen.core.digest import check_digest
from maskgen.core.errors import FormatError, clip
from maskgen.core.files import check_keys
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, KINDS

QUANT_METHOD = "sparse_nm"
FORMAT_VERSION = 3
WITHOUT_DIGESTS = 2
"""The version before shards had digests."""

CONFIG_KEY = "quantization_config"

WEIGHTS_KEY = "transformers_weights"
"""Where `config.json` may name the file that transformers takes weights from."""

GUARD = (
    "this checkpoint is sparse; call maskgen.hf.loader.register() first, or make it dense with `maskgen decompress DIR "
    "--out DENSE`"
)
"""Stands under `WEIGHTS_KEY`. transformers passes over a `quant_method` that it does not know and would fill the layers
with random numbers; it refuses what is no name of a safetensors file, with this text."""

_KEYS = (
    "quant_method",
    "format_version",
    "pattern",
    "values",
    "correction",
    "targets",
    "ignored",
    "mask_digest",
    "recipe_digest",
    "base_model",
)
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}")
_MAX_MODULES = 1 << 20
_MAX_LABEL_CHARS = 256


@dataclass(frozen=True)
class SparseConfig:
    """The manifest of a sparse checkpoint.

    `targets` are the modules stored as values + bitmask, `ignored` the Linear modules kept dense; together they are
    every Linear of the model. `mask_digest` is `MaskSet.digest()`. `base_model` is a label for people (a hub id or
    directory name); `base_digest` identifies the dense weights. `values` (`float`, `int8` or `fp8_e4m3`) and
    `correction` hold for all targets. `shards` maps the name of each shard to the digest of its bytes; it is None in
    version 2, and until the shards are written.
    """

    pattern: NMPattern
    targets: tuple[str, ...]
    ignored: tuple[str, ...]
    mask_digest: str
    recipe_digest: str
    base_model: str
    base_digest: str
    values: str = FLOAT
    correction: CorrectionConfig | None = None
    shards: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.values not in KINDS:
            raise FormatError(f"{CONFIG_KEY}: values {clip(self.values)}, expected one of {list(KINDS)}")
        _check_modules(self.targets, "targets", least=1)
        _check_modules(self.ignored, "ignored", least=0)
        both = set(self.targets) & set(self.ignored)
        if both:
            raise FormatError(f"{CONFIG_KEY}: {sorted(both)[0]!r} is both in targets and in ignored")
        for name in ("mask_digest", "recipe_digest", "base_digest"):
            check_digest(getattr(self, name), f"{CONFIG_KEY}: {name}")
        for name, digest in (self.shards or {}).items():
            if not is_shard_name(name):
                raise FormatError(f"{CONFIG_KEY}: shards: {clip(name)} is not a plain *.safetensors file name")
            check_digest(digest, f"{CONFIG_KEY}: shards: {name}")
        label = self.base_model
        if not isinstance(label, str) or not 0 < len(label) <= _MAX_LABEL_CHARS or not label.isprintable():
            raise FormatError(
                f"{CONFIG_KEY}: base_model.name {clip(label)}, expected 1 to {_MAX_LABEL_CHARS} printable characters"
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object stored in `config.json`."""
        section = {
            "quant_method": QUANT_METHOD,
            "format_version": WITHOUT_DIGESTS if self.shards is None else FORMAT_VERSION,
            "pattern": str(self.pattern),
            "values": self.values,
            "correction": None if self.correction is None else self.correction.to_dict(),
            "targets": list(self.targets),
            "ignored": list(self.ignored),
            "mask_digest": self.mask_digest,
            "recipe_digest": self.recipe_digest,
            "base_model": {"name": self.base_model, "digest": self.base_digest},
        }
        return section if self.shards is None else {**section, "shards": dict(self.shards)}

    @classmethod
    def from_dict(cls, value: Any) -> SparseConfig:
        """Read the JSON object; `FormatError` on anything this release does not know exactly."""
        if not isinstance(value, dict):
            raise FormatError(f"{CONFIG_KEY}: a {type(value).__name__}, expected an object")
        if value.get("quant_method") != QUANT_METHOD:
            raise FormatError(
                f"{CONFIG_KEY}: quant_method {clip(value.get('quant_method'))}, expected {QUANT_METHOD!r}"
            )
        version = value.get("format_version")
        if type(version) is not int or version not in (WITHOUT_DIGESTS, FORMAT_VERSION):
            raise FormatError(
                f"{CONFIG_KEY}: format_version {clip(version)}, this release reads {WITHOUT_DIGESTS} and "
                f"{FORMAT_VERSION}; upgrade sparse-serve or write the checkpoint again"
            )
        check_keys(value, _KEYS if version == WITHOUT_DIGESTS else (*_KEYS, "shards"), CONFIG_KEY)
        base = value["base_model"]
        if not isinstance(base, dict):
            raise FormatError(f"{CONFIG_KEY}: base_model {clip(base)}, expected an object")
        check_keys(base, ("name", "digest"), f"{CONFIG_KEY}: base_model")
        for name in ("targets", "ignored"):
            if not isinstance(value[name], list):
                raise FormatError(f"{CONFIG_KEY}: {name} is a {type(value[name]).__name__}, expected a list of names")
        shards = value.get("shards")
        if version == FORMAT_VERSION and (not isinstance(shards, dict) or not shards):
            raise FormatError(f"{CONFIG_KEY}: shards {clip(shards)}, expected an object of file names and digests")
        return cls(
            pattern=NMPattern.parse(value["pattern"]),
            targets=tuple(value["targets"]),
            ignored=tuple(value["ignored"]),
            mask_digest=value["mask_digest"],
            recipe_digest=value["recipe_digest"],
            base_model=base["name"],
            base_digest=base["digest"],
            values=value["values"],
            correction=read_correction(value["correction"]),
            shards=shards,
        )


def sparse_hf_config(hf_config: Mapping[str, Any], sparse: SparseConfig) -> dict[str, Any]:
    """`config.json` of a sparse checkpoint, from that of its dense model or of another sparse one.

    The guard is for configurations that transformers loads, which have a `model_type`.
    """
    guard = {WEIGHTS_KEY: GUARD} if "model_type" in hf_config else {}
    return {**dense_hf_config(hf_config), CONFIG_KEY: sparse.to_dict(), **guard}


def dense_hf_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the dense model that a checkpoint is decompressed to."""
    return {key: value for key, value in hf_config.items() if key not in (CONFIG_KEY, WEIGHTS_KEY)}


def with_shards(hf_config: Mapping[str, Any], shards: Mapping[str, str]) -> Mapping[str, Any]:
    """`config.json` with the digests of the shards beside it, if it is that of a sparse checkpoint."""
    section = hf_config.get(CONFIG_KEY)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return hf_config
    return {**hf_config, CONFIG_KEY: {**section, "format_version": FORMAT_VERSION, "shards": dict(shards)}}


def is_shard_name(name: Any) -> bool:
    """Whether `name` is that of a safetensors file, without separators and without a dot in front."""
    return isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None


def check_module_name(name: Any, where: str) -> None:
    """Raise `FormatError` unless `name` is a dotted name such as `model.layers.0.mlp.up_proj`."""
    if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
        raise FormatError(f"{where} holds {clip(name)}, which is not a dotted module name")


def _check_modules(names: tuple[str, ...], key: str, least: int) -> None:
    if not least <= len(names) <= _MAX_MODULES:
        raise FormatError(f"{CONFIG_KEY}: {key} holds {len(names)} names, expected {least} to {_MAX_MODULES}")
    for name in names:
        check_module_name(name, f"{CONFIG_KEY}: {key}")
    if len(set(names)) != len(names):
        raise FormatError(f"{CONFIG_KEY}: {key} names a module twice")

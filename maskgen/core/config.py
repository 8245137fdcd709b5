"""The manifest of a sparse checkpoint: the section `quantization_config` of its `config.json`, read strictly.

The section has that name because transformers and vLLM look there for a `quant_method`. A checkpoint may come from
anywhere: unknown keys and versions are errors, names are plain dotted identifiers, and nothing in the section can name
code, a file to open, or an amount of memory.

Version 3 has the digest of every shard; version 2, which is still read, has none. Version 4 is that of checkpoints with
int4 values, and says how many of them share a scale; for all others version 3 is written.
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
from maskgen.core.int4 import GROUPS
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, INT4, KINDS

QUANT_METHOD = "sparse_nm"
FORMAT_VERSION = 3
WITHOUT_DIGESTS = 2
"""The version before shards had digests."""

WITH_INT4 = 4
"""The version of int4 values, and of no others: readers before it refuse the checkpoint for its number."""

ROW = "row"
"""The group of kept values that share a scale, where it is a whole row."""

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
_KEYS_OF = {
    WITHOUT_DIGESTS: _KEYS,
    FORMAT_VERSION: (*_KEYS, "shards"),
    WITH_INT4: (*_KEYS, "group", "shards"),
}
_GROUPS_TEXT = f"expected 64, 128 or {ROW!r} for {INT4} and none for others"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}")
_MAX_MODULES = 1 << 20
_MAX_LABEL_CHARS = 256


@dataclass(frozen=True)
class SparseConfig:
    """The manifest of a sparse checkpoint.

    `targets` are the modules stored as values + bitmask, `ignored` the Linear modules kept dense; together they are
    every Linear of the model. `mask_digest` is `MaskSet.digest()`. `base_model` is a label for people (a hub id or
    directory name); `base_digest` identifies the dense weights. `values` (`float`, `int8`, `fp8_e4m3`, `int4`) and
    `correction` hold for all targets; of `int4` values `group` share a scale (64 or 128; None: those of a row), of
    others it is None. `shards` maps the name of each shard to the digest of its bytes; it is None in
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
    group: int | None = None

    def __post_init__(self) -> None:
        if self.values not in KINDS:
            raise FormatError(f"{CONFIG_KEY}: values {clip(self.values)}, expected one of {list(KINDS)}")
        if self.group not in (GROUPS if self.values == INT4 else (None,)):
            raise FormatError(f"{CONFIG_KEY}: a group of {clip(self.group)} for {self.values} values, {_GROUPS_TEXT}")
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
        version = WITHOUT_DIGESTS if self.shards is None else FORMAT_VERSION
        section = {
            "quant_method": QUANT_METHOD,
            "format_version": WITH_INT4 if self.values == INT4 else version,
            "pattern": str(self.pattern),
            "values": self.values,
            **({"group": self.group or ROW} if self.values == INT4 else {}),
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
        if type(version) is not int or version not in _KEYS_OF:
            raise FormatError(
                f"{CONFIG_KEY}: format_version {clip(version)}, this release reads {WITHOUT_DIGESTS} to "
                f"{WITH_INT4}; upgrade sparse-serve or write the checkpoint again"
            )
        check_keys(value, _KEYS_OF[version], CONFIG_KEY)
        if (version == WITH_INT4) != (value["values"] == INT4):
            raise FormatError(
                f"{CONFIG_KEY}: values {clip(value['values'])} in format_version {version}; {INT4} values, and no "
                f"others, have version {WITH_INT4}"
            )
        base = value["base_model"]
        if not isinstance(base, dict):
            raise FormatError(f"{CONFIG_KEY}: base_model {clip(base)}, expected an object")
        check_keys(base, ("name", "digest"), f"{CONFIG_KEY}: base_model")
        for name in ("targets", "ignored"):
            if not isinstance(value[name], list):
                raise FormatError(f"{CONFIG_KEY}: {name} is a {type(value[name]).__name__}, expected a list of names")
        shards = value.get("shards")
        if version != WITHOUT_DIGESTS and (not isinstance(shards, dict) or not shards):
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
            group=_read_group(value) if version == WITH_INT4 else None,
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
    if not is_sparse_config(hf_config):
        return hf_config
    section = hf_config[CONFIG_KEY]
    version = max(section["format_version"], FORMAT_VERSION)
    return {**hf_config, CONFIG_KEY: {**section, "format_version": version, "shards": dict(shards)}}


def is_sparse_config(hf_config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that it is that of a sparse checkpoint."""
    section = hf_config.get(CONFIG_KEY)
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def is_shard_name(name: Any) -> bool:
    """Whether `name` is that of a safetensors file, without separators and without a dot in front."""
    return isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None


def check_module_name(name: Any, where: str) -> None:
    """Raise `FormatError` unless `name` is a dotted name such as `model.layers.0.mlp.up_proj`."""
    if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
        raise FormatError(f"{where} holds {clip(name)}, which is not a dotted module name")


def _read_group(value: Mapping[str, Any]) -> int | None:
    group = value["group"]
    if group != ROW and (type(group) is not int or group not in GROUPS):
        raise FormatError(f"{CONFIG_KEY}: a group of {clip(group)} for {INT4} values, {_GROUPS_TEXT}")
    return None if group == ROW else group


def _check_modules(names: tuple[str, ...], key: str, least: int) -> None:
    if not least <= len(names) <= _MAX_MODULES:
        raise FormatError(f"{CONFIG_KEY}: {key} holds {len(names)} names, expected {least} to {_MAX_MODULES}")
    for name in names:
        check_module_name(name, f"{CONFIG_KEY}: {key}")
    if len(set(names)) != len(names):
        raise FormatError(f"{CONFIG_KEY}: {key} names a module twice")

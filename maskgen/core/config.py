"""`quantization_config` of a sparse checkpoint: what `config.json` says about masks, read strictly.

The key is called `quantization_config` because that is where transformers and vLLM look for a `quant_method`. The
value comes from a stranger: unknown keys and versions are refused, names are plain dotted identifiers, and nothing in
it can name code, a file, or an amount of memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from maskgen.core.digest import check_digest
from maskgen.core.errors import FormatError, clip
from maskgen.core.pattern import NMPattern

QUANT_METHOD = "sparse_nm"
FORMAT_VERSION = 1
CONFIG_KEY = "quantization_config"

_KEYS = (
    "quant_method",
    "format_version",
    "pattern",
    "targets",
    "ignored",
    "mask_digest",
    "recipe_digest",
    "base_model",
)
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}")
_MAX_MODULES = 1 << 20
_MAX_LABEL_CHARS = 256


@dataclass(frozen=True)
class SparseConfig:
    """The manifest of a sparse checkpoint.

    `targets` are the modules stored as values + bitmask, `ignored` the Linear modules kept dense; together they are
    every Linear of the model. `mask_digest` is `MaskSet.digest()`. `base_model` is a label for people (a hub id or
    directory name); `base_digest` identifies the dense weights.
    """

    pattern: NMPattern
    targets: tuple[str, ...]
    ignored: tuple[str, ...]
    mask_digest: str
    recipe_digest: str
    base_model: str
    base_digest: str

    def __post_init__(self) -> None:
        _check_modules(self.targets, "targets", least=1)
        _check_modules(self.ignored, "ignored", least=0)
        both = set(self.targets) & set(self.ignored)
        if both:
            raise FormatError(f"{CONFIG_KEY}: {sorted(both)[0]!r} is both in targets and in ignored")
        for name in ("mask_digest", "recipe_digest", "base_digest"):
            check_digest(getattr(self, name), f"{CONFIG_KEY}: {name}")
        label = self.base_model
        if not isinstance(label, str) or not 0 < len(label) <= _MAX_LABEL_CHARS or not label.isprintable():
            raise FormatError(
                f"{CONFIG_KEY}: base_model.name {clip(label)}, expected 1 to {_MAX_LABEL_CHARS} printable characters"
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object stored in `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "pattern": str(self.pattern),
            "targets": list(self.targets),
            "ignored": list(self.ignored),
            "mask_digest": self.mask_digest,
            "recipe_digest": self.recipe_digest,
            "base_model": {"name": self.base_model, "digest": self.base_digest},
        }

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
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(
                f"{CONFIG_KEY}: format_version {clip(version)}, this release reads {FORMAT_VERSION}; upgrade "
                "sparse-serve or write the checkpoint again"
            )
        _check_keys(value, _KEYS, CONFIG_KEY)
        base = value["base_model"]
        if not isinstance(base, dict):
            raise FormatError(f"{CONFIG_KEY}: base_model {clip(base)}, expected an object")
        _check_keys(base, ("name", "digest"), f"{CONFIG_KEY}: base_model")
        for name in ("targets", "ignored"):
            if not isinstance(value[name], list):
                raise FormatError(f"{CONFIG_KEY}: {name} is a {type(value[name]).__name__}, expected a list of names")
        return cls(
            pattern=NMPattern.parse(value["pattern"]),
            targets=tuple(value["targets"]),
            ignored=tuple(value["ignored"]),
            mask_digest=value["mask_digest"],
            recipe_digest=value["recipe_digest"],
            base_model=base["name"],
            base_digest=base["digest"],
        )


def check_module_name(name: Any, where: str) -> None:
    """Raise `FormatError` unless `name` is a dotted name such as `model.layers.0.mlp.up_proj`."""
    if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
        raise FormatError(f"{where} holds {clip(name)}, which is not a dotted module name")


def _check_keys(value: dict[str, Any], expected: tuple[str, ...], where: str) -> None:
    unknown, missing = sorted(set(value) - set(expected)), sorted(set(expected) - set(value))
    if unknown or missing:
        raise FormatError(
            f"{where}: unknown keys {clip(unknown)}, missing keys {missing}; format version {FORMAT_VERSION} has "
            f"exactly {list(expected)}"
        )


def _check_modules(names: tuple[str, ...], key: str, least: int) -> None:
    if not least <= len(names) <= _MAX_MODULES:
        raise FormatError(f"{CONFIG_KEY}: {key} holds {len(names)} names, expected {least} to {_MAX_MODULES}")
    for name in names:
        check_module_name(name, f"{CONFIG_KEY}: {key}")
    if len(set(names)) != len(names):
        raise FormatError(f"{CONFIG_KEY}: {key} names a module twice")

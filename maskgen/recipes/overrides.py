"""Overrides of single values of a recipe, `key.path=value`, as `--set` takes them.

Values are TOML; what is not TOML is taken as a string. An override that names another method than the recipe's drops
the options that the recipe gives to its own, which that one may not have. Such overrides come first, so the options of
others count.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from maskgen.core.errors import RecipeError

_METHODS = ("method.name", "prior.name")


def apply(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change the tables of a recipe, in place. Raises `RecipeError` for what is no override."""
    for override in sorted(overrides, key=lambda override: _key(override) not in _METHODS):
        _apply(raw, override)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise RecipeError(f"override {override!r}: expected key=value, for example method.damp=0.05")
    table: Any = raw
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override {override!r}: {part} is not a table")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if _key(override) in _METHODS and table.get(last) != value:
        table.clear()
    table[last] = value


def _key(override: str) -> str:
    return override.partition("=")[0].strip()

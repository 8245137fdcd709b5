"""From parsed flags to the typed request that the Python API takes, with errors that name the flag."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TypeVar

from sparse_serve.runtime.errors import SettingsError
from sparse_serve.runtime.request import Request

Kind = TypeVar("Kind", bound=Request)


def from_flags(kind: type[Kind], args: argparse.Namespace, flags: Mapping[str, str] | None = None) -> Kind:
    """A `kind` whose fields are attributes of `args`. `flags`: those not called like their field.

    Raises `SettingsError` for the first value out of range: flag, value, what was expected.
    """
    names = kind.model_fields
    try:
        return kind(**{name: getattr(args, name) for name in names})
    except SettingsError as error:
        _, field, rest = str(error).split("`", 2)
        flag = (flags or {}).get(field, f"--{field.replace('_', '-')}")
        raise SettingsError(flag + rest) from None

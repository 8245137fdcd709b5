"""From parsed flags to the typed request that the Python API takes, with errors that name the flag."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sparse_serve.runtime.errors import SettingsError

Request = TypeVar("Request", bound=BaseModel)


def from_flags(kind: type[Request], args: argparse.Namespace, flags: Mapping[str, str] | None = None) -> Request:
    """A `kind` whose fields are attributes of `args`. `flags`: those not called like their field.

    Raises `SettingsError` for the first value out of range: flag, value, what was expected.
    """
    try:
        return kind(**{name: getattr(args, name) for name in kind.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        flag = (flags or {}).get(name, f"--{name.replace('_', '-')}")
        raise SettingsError(f"{flag} {first['input']}: {first['msg'].lower()}") from None

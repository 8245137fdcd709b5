"""The base of what the Python API is asked for: a frozen pydantic model whose errors are those of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from maskgen.core.errors import clip
from sparse_serve.runtime.errors import SettingsError


class Request(BaseModel):
    """Base of every request. Raises `SettingsError`, naming the field, for a value out of range or an unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers see the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise SettingsError(_explain(type(self), error)) from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem as one line; the field's name stands in backticks at its start."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"`{name}` is no field of {kind.__name__}; known are {', '.join(kind.model_fields)}"
    if problem["type"] == "missing":
        return f"`{name}` is missing from {kind.__name__}"
    return f"`{name}` {clip(problem['input'])}: {problem['msg'].lower()}"

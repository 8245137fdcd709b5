"""Our options in vLLM's `--additional-config`, for example `{"sparse_nm": {"kernel": "reference"}}`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from maskgen.core.errors import FormatError
from maskgen.core.values import FLOAT, INT8
from sparse_serve.kernels import ACTIVATIONS
from sparse_serve.tuning.selection import AUTO

OPTIONS_KEY = "sparse_nm"

_LM_HEAD = (FLOAT, INT8)


@dataclass(frozen=True)
class Options:
    """`kernel` is the name of the one that serves, or "auto". With `activations` "int8" kernels may round them. With
    `lm_head` "int8" the output layer is multiplied in int8 (`plugin.head`)."""

    kernel: str = AUTO
    activations: str = FLOAT
    lm_head: str = FLOAT

    def __post_init__(self) -> None:
        for name, known in (("activations", ACTIVATIONS), ("lm_head", _LM_HEAD)):
            value = getattr(self, name)
            if value not in known:
                raise FormatError(
                    f"--additional-config {OPTIONS_KEY}: {name} is {value!r}, expected one of {list(known)}"
                )


def read_options(additional_config: Any) -> Options:
    """What vLLM was given. Raises `FormatError` for an option that there is not, or another value than it can have."""
    given = additional_config.get(OPTIONS_KEY, {}) if isinstance(additional_config, dict) else {}
    known = [field.name for field in fields(Options)]
    if not isinstance(given, dict) or (unknown := sorted(set(given) - set(known))):
        what = f": unknown keys {unknown}" if isinstance(given, dict) else f" is {given!r}"
        raise FormatError(f"--additional-config {OPTIONS_KEY}{what}, expected an object with some of {known}")
    return Options(**given)

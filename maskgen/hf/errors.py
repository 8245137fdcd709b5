"""What transformers raises about files it cannot use, as one `ModelError` with one line.

A machine that fails, rather than a file, is left to `maskgen.core.failures`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from maskgen.core.errors import ModelError, SparseError
from maskgen.core.failures import machine_failure

HF_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
    struct.error,
)
"""What transformers, and the readers it uses, are known to raise for configurations and weights they cannot use."""

_SAYS_LITTLE = (LookupError, AttributeError, ArithmeticError, AssertionError)


@contextmanager
def clear_errors(path: Path, what: str = "transformers cannot load it", advice: str = "") -> Iterator[None]:
    """Whatever transformers raises about a model becomes `PATH: WHAT: REASON`, with `advice` at its end."""
    try:
        yield
    except SparseError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if (failure := machine_failure(error)) is not None:
            raise failure from None
        # tokenizers knows no class of errors but `Exception` itself
        if not isinstance(error, HF_ERRORS) and type(error) is not Exception:
            raise
        raise ModelError(f"{path}: {what}: {first_line(error)}{advice}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, and the next one where it goes on there; with the type of an error whose text
    says little without it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}" if isinstance(error, _SAYS_LITTLE) else text

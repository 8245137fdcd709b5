"""What transformers raises about files it cannot use, as one `ModelError` with one line.

A machine that fails, rather than a file, is left to `maskgen.core.failures`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from maskgen.core.errors import ModelError, OutOfMemoryError, SparseError
from maskgen.core.failures import in_words

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
        if (failure := _of_machine(error)) is not None:
            raise failure from None
        # tokenizers knows no class of errors but `Exception` itself
        if not isinstance(error, HF_ERRORS) and type(error) is not Exception:
            raise
        raise ModelError(f"{path}: {what}: {first_line(error)}{advice}") from error


def _of_machine(error: BaseException) -> BaseException | None:
    """What failed of the machine, in place of which a library raised `error`; None if that is about the files.

    That a file is not there is no failure: libraries look for many.
    """
    cause: BaseException | None = error
    while cause is not None:
        unread = isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
        if unread or isinstance(in_words(cause), OutOfMemoryError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""Every error this project raises on purpose, in one tree.

    SparseError
     +-- PatternError       (ValueError)       an N:M pattern, or a mask that claims to follow one, is not legal
     +-- FormatError        (ValueError)       a file or directory is not what the format says: damaged or hostile
     +-- RecipeError        (ValueError)       a recipe or one of its options is wrong
     +-- RequestError       (ValueError)       a field of a request to the Python interface is wrong
     +-- ModelError         (ValueError)       this model cannot be handled
     +-- DataError          (ValueError)       text or tokens are missing, malformed or too short
     +-- NumericalError     (ArithmeticError)  NaN or infinity where numbers were expected, a factorisation failed
     +-- OutputExistsError  (FileExistsError)  the place to write to is taken
     +-- StorageError       (OSError)          a disk is full, or a file or directory cannot be read or written
     +-- OutOfMemoryError   (MemoryError)      the machine or its GPU has too little memory

Each is also a standard exception, so that callers can catch it without importing this module. A message says what
went wrong, the value, what was expected, and what to do next. Broken invariants of our own code are `assert`s.

A field of a request is written in backticks (`prior`); the command line shows its flag in place of it.

Values in messages often come from files of unknown origin, so they are quoted by `clip`: escaped, and never long.
"""

from __future__ import annotations

_CLIP_CHARS = 80


def clip(value: object) -> str:
    """`repr` of a value, cut so that a message stays one readable line whatever a file put there."""
    text = repr(value[: _CLIP_CHARS + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _CLIP_CHARS else text[:_CLIP_CHARS] + "..."


class SparseError(Exception):
    """Base of all errors that are meant for the user."""


class PatternError(SparseError, ValueError):
    """An N:M pattern, or a mask that claims to follow one, is not legal."""


class FormatError(SparseError, ValueError):
    """A file or directory does not follow its format: it is damaged or hostile."""


class RecipeError(SparseError, ValueError):
    """A recipe or one of its options is wrong."""


class RequestError(SparseError, ValueError):
    """A field of a request to the Python interface is wrong."""


class ModelError(SparseError, ValueError):
    """A model has a form that is not supported, or does not fit what is to be done with it."""


class DataError(SparseError, ValueError):
    """Text or tokens are missing, malformed or too short."""


class NumericalError(SparseError, ArithmeticError):
    """NaN or infinity where numbers were expected, or a factorisation failed."""


class OutputExistsError(SparseError, FileExistsError):
    """The file or directory to write exists already, or another process is writing it."""


class StorageError(SparseError, OSError):
    """A disk is full, or a file or directory cannot be read or written."""


class OutOfMemoryError(SparseError, MemoryError):
    """The machine, or its GPU, has too little memory for what was asked."""

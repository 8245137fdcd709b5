"""The error tree: ours, and each also what the standard library would have raised."""

from __future__ import annotations

import pytest

from maskgen.core import errors

KINDS = {
    errors.PatternError: ValueError,
    errors.FormatError: ValueError,
    errors.RecipeError: ValueError,
    errors.RequestError: ValueError,
    errors.ModelError: ValueError,
    errors.DataError: ValueError,
    errors.NumericalError: ArithmeticError,
    errors.OutputExistsError: FileExistsError,
    errors.StorageError: OSError,
    errors.OutOfMemoryError: MemoryError,
}


def test_every_error_is_listed_here() -> None:
    ours = {kind for kind in errors.SparseError.__subclasses__() if kind.__module__ == errors.__name__}
    assert ours == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_two_parents(kind: type[errors.SparseError]) -> None:
    assert issubclass(kind, KINDS[kind])
    assert str(kind("layer: too wide")) == "layer: too wide"


@pytest.mark.parametrize("value", ["x" * 10**6, b"x" * 10**6, ["x"] * 10**5, "\n" * 100, 10**4000, None, "\ud800", {}])
def test_clip_is_one_short_printable_line(value: object) -> None:
    assert len(errors.clip(value)) <= 83
    assert errors.clip(value).isprintable()


def test_clip_leaves_short_values_alone() -> None:
    assert errors.clip("2:4") == "'2:4'"
    assert errors.clip([1, 2]) == "[1, 2]"

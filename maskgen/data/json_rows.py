"""The rows of a `.json` file, read one at a time wherever rows follow each other.

    [row, row, ...]          an array: its elements
    row row ...              objects one after the other, as in JSON lines, whatever the line breaks
    {"data": [row, ...]}     one object that is no row itself: the elements of its only list of objects

Only the last of these is read whole, and nothing of more than `sources.MAX_DOCUMENT_CHARS` characters is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from maskgen.core.errors import DataError, clip
from maskgen.data import columns

_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_END = 16
"""Characters that an escape or a literal cut short at the end of what is read can have."""


def rows(file: TextIO, source: str, read_chars: int, most_chars: int) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row. `DataError` for what is not JSON or has no rows, with its line."""
    values = _Values(file, source, read_chars, most_chars)
    first = values.peek()
    if first == "[":
        found = _elements(values)
    elif first == "{":
        found = _objects(values, source)
    elif not first:
        return
    else:
        raise DataError(f"{source}: begins with {clip(first)}; expected JSON, an array of objects or JSON lines")
    yield from found


def _elements(values: _Values) -> Iterator[tuple[str, Any]]:
    values.take("[")
    number = 0
    while values.peek() != "]" or number:
        where = f": row {number} (line {values.line})"
        yield where, values.value()
        number += 1
        if values.peek() != ",":
            break
        values.take(",")
    values.take("]")
    if values.peek():
        raise values.error("text after the end of the array")


def _objects(values: _Values, source: str) -> Iterator[tuple[str, Any]]:
    where, value, number = f": row 0 (line {values.line})", values.value(), 0
    if not values.peek():
        yield from _inside(value, source)
        return
    while True:
        yield where, value
        if not values.peek():
            return
        number += 1
        where = f": row {number} (line {values.line})"
        value = values.value()


def _inside(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file that is one object: itself, or those in its only list of objects."""
    if any(name in value for name in columns.TEXT_FIELDS):
        yield ": row 0", value
        return
    lists = [name for name, one in value.items() if isinstance(one, list) and any(isinstance(row, dict) for row in one)]
    if len(lists) != 1:
        what = "no list" if not lists else f"several lists ({clip(lists)})"
        raise DataError(
            f"{source}: one object with fields {clip(list(value))}, and {what} of objects in it; expected rows: "
            "an array of objects, or one object per line"
        )
    for number, row in enumerate(value[lists[0]]):
        yield f": {lists[0]}[{number}]", row


class _Values:
    """A JSON text that is read and parsed one value at a time."""

    def __init__(self, file: TextIO, source: str, read_chars: int, most_chars: int) -> None:
        self._file, self._source, self._read_chars, self._most_chars = file, source, read_chars, most_chars
        self._text, self._at = "", 0
        self._lines, self._counted = 1, 0
        self._decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        """Number of the line that is read now."""
        self._lines += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._lines

    def error(self, what: str) -> DataError:
        """`what` is wrong here."""
        return DataError(f"{self._source}:{self.line}: not valid JSON: {what}")

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(self._read_chars):
                return ""

    def take(self, character: str) -> None:
        """Step over one character, which is to be `character`."""
        found = self.peek()
        if found != character:
            raise self.error(f"expected {character!r}, found {clip(found) if found else 'the end of the file'}")
        self._at += 1

    def value(self) -> Any:
        """The next value. What is cut short is tried again with twice as much text."""
        self.peek()
        chars = self._read_chars
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_final(error) or not self._more(chars):
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise DataError(f"{self._source}:{line}: not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets as deep
                raise self.error(str(error)) from None
            else:
                if end < len(self._text) or not self._more(chars):  # a number at the end may go on
                    self._at = end
                    return value
            if len(self._text) > self._most_chars:
                raise DataError(
                    f"{self._source}:{self.line}: a row of more than {self._most_chars} characters; split it"
                )
            chars *= 2

    def _is_final(self, error: json.JSONDecodeError) -> bool:
        """Whether more text cannot mend it."""
        return not error.msg.startswith("Unterminated string") and error.pos < len(self._text) - _NEAR_END

    def _more(self, chars: int) -> bool:
        """Read on, and forget what is done with. False at the end of the file."""
        more = self._file.read(chars)
        if more:
            self._lines = self.line
            self._text, self._at, self._counted = self._text[self._at :] + more, 0, 0
        return bool(more)

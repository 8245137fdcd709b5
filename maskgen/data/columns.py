"""Which field of a row, or column of a table, has the text: "text" as it is, else a conversation through the template.

    "text"                           a string
    "messages", "conversations"      a conversation (`data.chat`); in a table of strings, written as JSON

The first that a row has is read, and other fields are passed over. What has a prompt and an answer in two fields is
refused: how a model is to see the two is not ours to guess.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from maskgen.core.errors import DataError, clip
from maskgen.data import chat

_EXAMPLE = 'an object with a string field "text", such as {"text": "..."}, or with "messages"'

TEXT_FIELDS = ("text", *chat.FIELDS)
"""Fields that are read, the first one first."""

_PAIRS = {
    "prompt", "response", "completion", "instruction", "input", "output", "question", "answer", "query", "reply",
    "chosen", "rejected",
}  # fmt: skip


def text_of_row(row: Any, tokenizer: Any, source: str, where: str) -> str:
    """The text of a JSON row at `where` in `source`. `DataError` for what is none."""
    if not isinstance(row, dict):
        raise DataError(f"{source}{where}: expected {_EXAMPLE}, found {clip(row)}")
    name = next((name for name in TEXT_FIELDS if name in row), None)
    if name is None:
        raise DataError(f"{source}{where}: expected {_EXAMPLE}{_found(list(row), 'fields')}")
    if name == "text" and not isinstance(row[name], str):
        raise DataError(f'{source}{where}: expected {_EXAMPLE}, found "text": {clip(row[name])}')
    return text_of_cell(name, row[name], tokenizer, source, where)


def column_of(names: Sequence[str], source: str) -> str:
    """The column of a table that is read. `DataError` when there is none, or one of that name twice."""
    name = next((name for name in TEXT_FIELDS if name in names), None)
    if name is None or list(names).count(name) != 1:
        raise DataError(f'{source}: expected one column "text", or one "messages"{_found(names, "columns")}')
    return name


def text_of_cell(name: str, value: Any, tokenizer: Any, source: str, where: str) -> str:
    """The text of the value of field or column `name`."""
    if name in chat.FIELDS:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise DataError(f'{source}{where}: "{name}" is not valid JSON: {error}') from None
        value = chat.render(value, tokenizer, f"{source}{where}")
    if not isinstance(value, str):
        raise DataError(f'{source}{where}: "{name}" is {clip(value)}, expected a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}{where}: half of a surrogate pair at character {error.start}") from None
    return value


def _found(names: Sequence[str], what: str) -> str:
    """What there is instead, and what to do about it."""
    found = f", found {what} {clip(list(names))}"
    if {str(name).lower() for name in names} & _PAIRS:
        found += (
            '; a prompt and an answer are not joined by guess: write them as one "text", or as "messages": [{"role": '
            '"user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]'
        )
    return found

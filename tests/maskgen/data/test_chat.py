"""Conversations through the model's chat template, from every kind of file, and what is refused and why."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from maskgen.core.errors import DataError
from maskgen.data import chat
from maskgen.data.sources import documents
from maskgen.data.tokens import read_tokens
from tests import models

ASKED = [{"role": "user", "content": "the old fox?"}, {"role": "assistant", "content": "a boat"}]
SHARED = [{"from": "human", "value": "the old fox?"}, {"from": "gpt", "value": "a boat"}]
RENDERED = "<bos><start_of_turn>user\nthe old fox?<end_of_turn>\n<start_of_turn>assistant\na boat<end_of_turn>\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return models.bos_tokenizer()


def texts(source: Path | str, tokenizer: Any) -> list[str]:
    return ["".join(document) for document in documents(source, tokenizer)]


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("value", [ASKED, SHARED])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_conversations_are_rendered_wherever_they_are(
    name: str, value: list[dict[str, str]], suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": [7, 8], name: [value, value]}), path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", name], [7, json.dumps(value)], [8, json.dumps(value)]])
    else:
        rows = [{"id": number, name: value} for number in (7, 8)]
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)), "utf-8")
    assert texts(path, tokenizer) == [RENDERED] * 2


def test_conversations_of_the_hub(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"prompt": ["x"], "messages": [ASKED]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert texts("hf:org/name", tokenizer) == [RENDERED]


def test_special_tokens_are_ids_and_windows_bring_bos_so_it_is_not_there_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": ASKED}) + "\n") * 2, "utf-8")
    ids = read_tokens(tmp_path / "a.jsonl", tokenizer).tolist()
    start, eos = tokenizer.convert_tokens_to_ids("<start_of_turn>"), tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in ids
    assert ids[0] == start and ids.count(start) == 4 and ids.count(eos) == 1
    assert tokenizer.decode(ids) == (RENDERED * 2).replace("<bos>", "<eos>").removeprefix("<eos>")


def test_a_first_token_that_is_called_bos_stays_where_the_tokenizer_puts_none(tmp_path: Path) -> None:
    """As in SmolLM2, whose template begins every message with it."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ bos_token }}{{ message.content }}{% endfor %}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": ASKED}), "utf-8")
    assert tokenizer.decode(read_tokens(tmp_path / "a.jsonl", tokenizer)) == "<s>the old fox?<s>a boat"


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "user: ab;"),
        ([{"role": "system", "content": "s", "name": None}, {"from": "user", "value": "u"}], "system: s;user: u;"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "assistant: calls 1;"),
    ],
)
def test_messages_of_other_makers(messages: list[Any], rendered: str) -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.name is defined %}NAMED{% endif %}"
        "{% if m.tool_calls %}calls {{ m.tool_calls | length }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    assert chat.render(messages, tokenizer, "here") == rendered


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", r'"messages" is not valid JSON'),
        (None, r"messages are None, expected a list of"),
        ([], r"messages are \[\]"),
        ({"role": "user"}, r"messages are \{'role': 'user'\}"),
        (["hi"], r'message 0: expected an object with "role" and "content", found \'hi\''),
        ([*ASKED, {"role": 3, "content": "x"}], r'message 2: "role" is 3, expected a string such as "user"'),
        ([{"content": "x"}], r'message 0: "role" is None'),
        ([{"role": "user"}], r'message 0: "content" is None, expected a string'),
        ([{"from": "narrator", "value": "x"}], r"message 0: from 'narrator', expected one of \['assistant', 'gpt'"),
        ([{"from": "human", "value": 3}], r'message 0: "content" is 3'),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content \{'type': 'image'\} is no text"),
        ([{"role": "user", "content": "\ud83d"}], r"half of a surrogate pair at character 25"),
    ],
)
def test_what_is_no_conversation(value: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps({"messages": value}), "utf-8")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}|a\.jsonl:2: {message}"):
        texts(path, tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'x' + 3 }}", "can only concatenate str"),
    ],
)
def test_what_the_template_refuses_is_said_in_its_words(template: str, reason: str) -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"here: the model's chat template refuses this conversation: .*{reason}"):
        chat.render(ASKED, tokenizer, "here")


@pytest.mark.parametrize("tokenizer_of", [models.tokenizer, lambda: None])
def test_a_model_without_a_template_is_told_what_to_do(tokenizer_of: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": ASKED}), "utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:1: a conversation, but the model's tokenizer has no chat template"):
        texts(tmp_path / "a.jsonl", tokenizer_of())

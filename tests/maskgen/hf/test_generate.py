"""Text that a model writes: conversations with its own template, documents without one, the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from maskgen.core.errors import DataError
from maskgen.hf import generate, model
from maskgen.hf.generate import Writer
from tests.conftest import ModelDir
from tests.maskgen.arithmetic import ProductDtypes, processor_has_bfloat16

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def writer(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> Writer:
    for name in ("QUESTION_TOKENS", "ANSWER_TOKENS", "DOCUMENT_TOKENS"):
        monkeypatch.setattr(generate, name, 6)
    return Writer(model.load(model_dir()), AutoTokenizer.from_pretrained(model_dir()))


def test_a_chat_model_asks_and_answers(writer: Writer) -> None:
    writer.tokenizer.chat_template = TEMPLATE
    told: list[int] = []
    rows = list(writer.rows(3, 0, told.append))
    assert len(rows) >= 3 and told[-1] == len(rows)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
    assert list(writer.rows(3, 0)) == rows != list(writer.rows(3, 1))


def test_the_random_numbers_of_others_stay_as_they_are(writer: Writer) -> None:
    before = torch.get_rng_state()
    list(writer.rows(1, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_model_writes_documents(writer: Writer) -> None:
    rows = list(writer.rows(3, 0))
    assert len(rows) >= 3 and all(row.keys() == {"text"} and row["text"] for row in rows)


def test_a_turn_ends_where_the_model_ends_it(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unlike lengths are filled up in front, and what comes after the end is not text."""
    end = writer.tokenizer.eos_token_id

    def answer(ids_BT: torch.Tensor, **others: Any) -> torch.Tensor:
        assert ids_BT[1, -1] == 9 and others["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
        return torch.cat([ids_BT, torch.tensor([[5, end, 6], [7, 8, 9]])], dim=1)

    monkeypatch.setattr(writer.model, "generate", answer)
    assert writer._continue([[1, 2, 3], [9]], 3) == [[5], [7, 8, 9]]


def test_a_model_that_writes_nothing_is_an_error(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    end = writer.tokenizer.eos_token_id
    monkeypatch.setattr(
        writer.model, "generate", lambda ids_BT, **others: torch.cat([ids_BT, torch.full((len(ids_BT), 1), end)], dim=1)
    )
    with pytest.raises(DataError, match="wrote 0 texts where 2 were wanted; give a file"):
        list(writer.rows(2, 0))


@pytest.mark.parametrize(("fast", "multiplied"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_batch_is_multiplied_in_what_the_processor_is_fast_in(
    fast: bool, multiplied: torch.dtype, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, fast)
    writer.model.to(torch.bfloat16)
    with ProductDtypes() as dtypes:
        writer._continue([[1, 2, 3]] * 16, 4)
    assert dtypes.seen == {multiplied}

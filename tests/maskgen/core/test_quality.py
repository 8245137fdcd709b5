"""The record of a model's quality: what it says to people, and that a hostile file says nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskgen.core.errors import FormatError
from maskgen.core.quality import QUALITY_FILE, Quality, known_quality, name_for_people, read_quality, stored

BAD = Quality(21.7, 54.5, 0.931, 0.582, 16, 512, False, ("a.txt", "b.txt"), "sparsegpt", "2:4")
GOOD = dataclasses.replace(BAD, perplexity=22.0)


def write(folder: Path, value: Any) -> None:
    (folder / QUALITY_FILE).write_text(value if isinstance(value, str) else json.dumps(value))


def test_it_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    assert read_quality(tmp_path) is None
    for quality in (BAD, dataclasses.replace(GOOD, pattern="", method="maskprune", bos=True)):
        write(tmp_path, stored(quality)[QUALITY_FILE])
        assert read_quality(tmp_path) == quality
    assert stored("no text") == {}


def test_what_is_said() -> None:
    assert BAD.describe() == (
        "perplexity 21.70 dense -> 54.50 2:4 (+151 %), KL 0.931 nats per token, top-1 agreement 58.2%, on 16 held-out "
        "windows of 512 tokens of a.txt, b.txt"
    )
    assert GOOD.lines() == [GOOD.describe()] and "(+1.4 %)" in GOOD.describe() and GOOD.advice() == []
    said = BAD.lines()
    assert said[0] == BAD.describe() and said[1].startswith("that is bad") and len(said) == 2 + len(BAD.advice())
    assert said[2].startswith("1. ") and said[-1].startswith(f"{len(BAD.advice())}. ")
    foreign = dataclasses.replace(BAD, method="of_somebody_else").lines()
    assert foreign == [BAD.describe(), "that is bad: more than +25%"]
    lost = dataclasses.replace(BAD, perplexity=1e300)
    assert lost.is_bad and "1e+300" in lost.describe()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("magnitude", ["best-effort", "sparsegpt", "reconstruct"]),
        ("wanda", ["best-effort", "calibration text", "sparsegpt", "reconstruct"]),
        ("sparsegpt", ["best-effort", "calibration text", "reconstruct"]),
        ("reconstruct", ["best-effort", "calibration text"]),
        ("maskllm", ["best-effort", "training text"]),
        ("adaptive_sparse", ["training text"]),
        ("unknown", ["best-effort", "reconstruct"]),
        ("of_somebody_else", []),
    ],
)
def test_what_to_try_next_depends_on_what_was_done(method: str, words: list[str]) -> None:
    advice = dataclasses.replace(BAD, method=method).advice()
    assert len(advice) == len(words) and all(word in text for word, text in zip(words, advice, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity": -1.0}, "perplexity -1.0"),
        ({"perplexity": 3}, "perplexity 3"),
        ({"kl": True}, "kl True"),
        ({"agreement": 1.5}, "agreement 1.5"),
        ({"windows": 0}, "windows 0"),
        ({"window_tokens": 2.0}, "window_tokens 2.0"),
        ({"bos": 1}, "bos 1"),
        ({"texts": []}, "texts"),
        ({"texts": "a.txt"}, "texts"),
        ({"texts": ["\x1b[2J"]}, "texts"),
        ({"texts": ["a"] * 17}, "texts"),
        ({"texts": ["a" * 129]}, "texts"),
        ({"texts": [1]}, "texts"),
        ({"method": "a b"}, "method"),
        ({"method": None}, "method"),
        ({"pattern": "all"}, "pattern"),
        ({"pattern": ["2:4"]}, "pattern"),
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": True}, "format_version True"),
        ({"advice": "buy"}, "keys"),
    ],
)
def test_a_file_that_is_not_as_it_is_written_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, {**BAD.to_dict(), **change})
    with pytest.raises(FormatError, match=f"{QUALITY_FILE}: {message}.*delete it"):
        read_quality(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"kl": NaN}', '{"format_version": 1, "kl": 1e999}', " " * (1 << 17)])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    with pytest.raises(FormatError, match=QUALITY_FILE):
        read_quality(tmp_path)


@given(st.text())
def test_any_name_can_be_stored(name: str) -> None:
    dataclasses.replace(BAD, texts=(name_for_people(name),))


def test_a_damaged_record_is_no_reason_to_stop_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert known_quality(tmp_path / "none") is None and known_quality(tmp_path) is None and not caplog.records
    write(tmp_path, BAD.to_dict())
    assert known_quality(tmp_path) == BAD
    for damaged in ('{"kl": ', json.dumps({**BAD.to_dict(), "kl": -1.0})):
        caplog.clear()
        write(tmp_path, damaged)
        assert known_quality(tmp_path) is None and "delete it, or measure again" in caplog.text


def test_no_change_has_no_minus() -> None:
    assert "(+0.0 %)" in dataclasses.replace(BAD, perplexity=BAD.dense_perplexity * (1 - 1e-6)).describe()

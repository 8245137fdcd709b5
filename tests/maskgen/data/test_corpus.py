"""Which window a step sees: every one once a pass, held-out ones never, and the same after a restart.

Legend: S = windows, T = tokens, F = files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import DataError
from maskgen.data import corpus as corpora
from maskgen.data.corpus import Corpus, load_corpus
from maskgen.recipes.sections import Training
from tests import models

sizes_of_files = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def make(windows: list[int], window_tokens: int = 3, heldout: int = 0, seed: int = 0, tail: int = 0) -> Corpus:
    """Files of `windows` training windows each, and `heldout` in all; every token of all files is unique."""
    counter = itertools.count()
    streams = []
    for number, trained in enumerate(windows):
        mine = len(range(number, heldout, len(windows)))
        tokens = (trained + mine) * window_tokens + tail
        streams.append(torch.tensor(list(itertools.islice(counter, tokens)), dtype=torch.int64))
    return Corpus.pack(streams, [f"file {n}" for n in range(len(windows))], window_tokens, heldout, seed)


def rows(windows_ST: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in windows_ST.tolist()]


@settings(max_examples=60, deadline=None)
@given(windows=sizes_of_files, heldout=st.integers(1, 9), tail=st.integers(0, 2), seed=st.integers(0, 99))
def test_a_pass_sees_every_window_once_and_no_held_out_one(
    windows: list[int], heldout: int, tail: int, seed: int
) -> None:
    corpus = make(windows, heldout=heldout, tail=tail, seed=seed)
    kept_out = set(rows(corpus.heldout))
    assert len(kept_out) == heldout
    for file, size in enumerate(windows):
        mine = rows(corpus.files[file])
        assert len(mine) == size and not kept_out & set(mine)
        for epoch in range(2):
            steps = range(epoch * size, (epoch + 1) * size)
            seen = [rows(corpus.batch(step, len(windows)))[file] for step in steps]
            assert sorted(seen) == sorted(mine)


@settings(max_examples=60, deadline=None)
@given(windows=sizes_of_files, batch=st.integers(1, 9), steps=st.integers(1, 6))
def test_files_contribute_equally_whatever_their_size(windows: list[int], batch: int, steps: int) -> None:
    corpus = make(windows)
    owner = {row: file for file, held in enumerate(corpus.files) for row in rows(held)}
    seen = Counter(owner[row] for step in range(steps) for row in rows(corpus.batch(step, batch)))
    shares = [seen[file] for file in range(len(windows))]
    assert sum(shares) == steps * batch
    assert max(shares) - min(shares) <= 1


@settings(max_examples=40, deadline=None)
@given(windows=sizes_of_files, batch=st.integers(1, 7), steps=st.permutations(range(8)))
def test_a_step_depends_on_its_number_alone(windows: list[int], batch: int, steps: list[int]) -> None:
    """Asked in order, in any order, or of a corpus that was just made; and however samples are cut into steps."""
    corpus = make(windows)
    in_order = {step: corpus.batch(step, batch) for step in sorted(steps)}
    for step in steps:
        assert torch.equal(corpus.batch(step, batch), in_order[step])
        assert torch.equal(make(windows).batch(step, batch), in_order[step])
    assert torch.equal(make(windows).batch(0, 8 * batch), torch.cat([in_order[step] for step in range(8)]))


def test_passes_and_seeds_are_shuffled_differently() -> None:
    one, other = make([40], seed=1), make([40], seed=2)
    assert not torch.equal(one.batch(0, 40), other.batch(0, 40))
    assert not torch.equal(one.batch(0, 40), one.batch(1, 40))
    two = make([40, 40], seed=1)
    positions = [[rows(two.files[file]).index(row) for row in rows(two.batch(0, 80))[file::2]] for file in range(2)]
    assert positions[0] != positions[1], "two files must not be shuffled alike"


def test_held_out_windows_are_the_last_whole_ones_of_each_file() -> None:
    streams = [torch.arange(10), torch.arange(100, 108)]
    corpus = Corpus.pack(streams, ["a", "b"], window_tokens=2, heldout_windows=3, seed=0)
    assert corpus.heldout.tolist() == [[6, 7], [8, 9], [106, 107]]
    assert corpus.files[0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert corpus.files[1].tolist() == [[100, 101], [102, 103], [104, 105]]
    assert corpus.heldout.dtype == corpus.batch(0, 1).dtype == torch.int64


def test_windows_are_views_and_the_digest_is_of_the_tokens() -> None:
    ids = torch.arange(20, dtype=torch.int32)
    corpus = Corpus.pack([ids], ["a"], 4, 1, 0)
    assert corpus.files[0].untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()
    assert Corpus.pack([ids.long()], ["other name"], 4, 1, 0).digest() == corpus.digest()
    for change in (lambda x: x.flip(0), lambda x: x[:-4]):
        assert Corpus.pack([change(ids)], ["a"], 4, 1, 0).digest() != corpus.digest()
    assert Corpus.pack([ids], ["a"], 4, 2, 0).digest() != corpus.digest()


def test_files_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match=r"b: 8 tokens make 2 windows of 4, and 2 of them are held out; give more text"):
        Corpus.pack([torch.arange(40), torch.arange(8)], ["a", "b"], 4, 4, 0)
    with pytest.raises(DataError, match=r"b: the same tokens as a; give every file once"):
        Corpus.pack([torch.arange(40), torch.arange(40)], ["a", "b"], 4, 4, 0)


SPEC = Training(window_tokens=8, heldout_windows=2)


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    files[0].write_text(models.TEXT[:2000], "utf-8")
    files[1].write_text("".join(f'{{"text": "{number} foxes and {number} boats"}}\n' for number in range(40)), "utf-8")
    return files


def test_the_cache_changes_nothing_and_spares_tokenising(
    text: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, cache = models.tokenizer(), tmp_path / "cache"
    plain, first = load_corpus(text, tokenizer, SPEC), load_corpus(text, tokenizer, SPEC, cache)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(corpora, "token_pieces", lambda *_: pytest.fail("tokenised again"))
    again = load_corpus(text, models.tokenizer(), SPEC, cache)
    for corpus in (first, again):
        assert corpus.digest() == plain.digest()
        assert torch.equal(corpus.batch(3, 5), plain.batch(3, 5))
        assert torch.equal(corpus.heldout, plain.heldout)


def test_the_cache_is_for_this_text_and_this_tokenizer(text: list[Path], tmp_path: Path) -> None:
    tokenizer, cache = models.tokenizer(), tmp_path / "cache"
    before = load_corpus(text, tokenizer, SPEC, cache).digest()
    text[0].write_text(models.TEXT[5:2005], "utf-8")
    assert load_corpus(text, tokenizer, SPEC, cache).digest() != before
    assert len(list(cache.iterdir())) == 3
    tokenizer.eos_token = models.BOS
    changed = load_corpus(text, tokenizer, SPEC, cache)
    assert len(list(cache.iterdir())) == 5
    assert changed.digest() == load_corpus(text, tokenizer, SPEC).digest()
    tokenizer.chat_template = "{{ messages[0].content }}"
    load_corpus(text, tokenizer, SPEC, cache)
    assert len(list(cache.iterdir())) == 7


def test_a_cache_is_whole_or_absent_and_damage_is_found(
    text: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, cache = models.tokenizer(), tmp_path / "cache"
    text[1].write_text('{"text": "fine"}\n{"text": 3}\n', "utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl:2"):
        load_corpus(text[1:], tokenizer, SPEC, cache)
    assert not list(cache.iterdir())
    load_corpus(text[:1], tokenizer, SPEC, cache)
    (stored,) = cache.iterdir()
    whole = stored.read_bytes()
    for damaged in (whole[:-2], b"", whole[:-4] + b"\xff\xff\xff\x7f", whole[:-4] + b"\xff\xff\xff\xff"):
        stored.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged token cache of .*; delete this file"):
            load_corpus(text[:1], tokenizer, SPEC, cache)


def test_cached_ids_are_mapped_not_read(text: list[Path], tmp_path: Path) -> None:
    tokenizer, cache = models.tokenizer(), tmp_path / "cache"
    corpus = load_corpus(text[:1], tokenizer, SPEC, cache)
    (stored,) = cache.iterdir()
    assert str(stored) in Path("/proc/self/maps").read_text("utf-8")
    assert corpus.files[0].untyped_storage().nbytes() == stored.stat().st_size

"""BOS: the tokenizer decides, a person may say otherwise, and a window's length counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from maskgen.core.errors import DataError
from maskgen.data.bos import Bos
from maskgen.data.corpus import Corpus, load_corpus
from maskgen.data.tokens import calibration_windows, read_tokens
from maskgen.recipes.sections import Training
from tests import models


def with_template(single: str, **special: str) -> PreTrainedTokenizerFast:
    """The plain tokenizer with a post-processor; BOS is id 0, EOS id 1."""
    made = models.tokenizer()
    ids = [(token, made.convert_tokens_to_ids(token)) for token in (models.BOS, models.EOS)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    for name, token in special.items():
        setattr(made, name, token)
    return made


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (models.tokenizer, ()),
        (models.bos_tokenizer, (2,)),
        (lambda: with_template("<s> $A </s>"), (0,)),
        (lambda: with_template("$A </s>"), ()),
        (lambda: with_template("$A </s>", bos_token="</s>"), ()),  # BOS and EOS are one token, put behind
        (lambda: with_template("</s> $A", bos_token="</s>"), (1,)),  # the same, put in front
        (lambda: with_template("</s> <s> $A", bos_token=None), (1, 0)),
    ],
)
def test_what_a_tokenizer_puts_in_front_is_what_windows_begin_with(
    make: Callable[[], PreTrainedTokenizerFast], own: tuple[int, ...]
) -> None:
    tokenizer = make()
    assert Bos.of(tokenizer) == Bos(own, bool(own))
    assert Bos.of(tokenizer, False) == Bos((), bool(own))


def test_a_person_may_ask_for_it() -> None:
    assert Bos.of(models.tokenizer(), True) == Bos((0,), False)
    assert Bos.of(models.bos_tokenizer(), True) == Bos((2,), True)
    without = models.tokenizer()
    without.bos_token = None
    with pytest.raises(DataError, match="`bos`: the tokenizer has no beginning-of-sequence token; leave it out"):
        Bos.of(without, True)


def test_calibration_windows_begin_with_it_and_keep_their_length(text_file: Path) -> None:
    tokenizer = models.bos_tokenizer()
    ids = read_tokens(text_file, tokenizer)
    assert 2 not in ids, "documents themselves are without it"

    def cut(bos: bool | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return calibration_windows([text_file], tokenizer, 12, 10, generator, Bos.of(tokenizer, bos))

    windows = cut(None)
    assert windows.shape == (12, 10) and windows.dtype == torch.int64 and (windows[:, 0] == 2).all()
    stretches = {tuple(window) for window in ids.unfold(0, 9, 1).tolist()}
    assert all(tuple(window[1:]) in stretches for window in windows.tolist())
    assert cut(False).shape == (12, 10) and 2 not in cut(False)
    with pytest.raises(DataError, match="windows of 1 tokens have no room for text after BOS"):
        calibration_windows([text_file], tokenizer, 1, 1, torch.Generator())


def test_training_and_held_out_windows_begin_with_it(text_file: Path, tmp_path: Path) -> None:
    tokenizer, spec = models.bos_tokenizer(), Training(window_tokens=8, heldout_windows=3)
    corpus = load_corpus([text_file], tokenizer, spec, tmp_path / "cache")
    batch = corpus.batch(2, 5)
    assert batch.shape == (5, 8) and corpus.heldout.shape == (3, 8)
    assert (batch[:, 0] == 2).all() and (corpus.heldout[:, 0] == 2).all()
    ids = read_tokens(text_file, tokenizer)
    used = len(ids) // 7 * 7
    assert torch.equal(torch.cat([corpus.files[0].flatten(), corpus.heldout[:, 1:].flatten().int()]), ids[:used])
    without = load_corpus([text_file], tokenizer, spec, tmp_path / "cache", bos=False)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the same ids serve both"
    assert 2 not in without.batch(0, 9) and without.digest() != corpus.digest()


def test_the_digest_of_a_corpus_tells_one_bos_from_another() -> None:
    ids = torch.arange(40)
    packed = [Corpus.pack([ids], ["a"], 8, 1, 0, Bos(bos)) for bos in ((), (1,), (2,), (1, 2), (2, 1))]
    assert len({corpus.digest() for corpus in packed}) == 5
    assert packed[0].digest() == Corpus.pack([ids], ["a"], 8, 1, 0).digest()

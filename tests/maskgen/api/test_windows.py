"""What windows of text begin with, from the request to the result."""

from __future__ import annotations

from pathlib import Path

import pytest

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import DataError
from maskgen.data.bos import Bos
from tests import models
from tests.maskgen.api.test_functions import learn, prune


def test_a_model_whose_tokenizer_puts_bos_in_front_is_pruned_trained_and_scored_with_it(
    text_file: Path, tmp_path: Path
) -> None:
    dense = models.save("llama", tmp_path / "dense", tokens=models.bos_tokenizer)
    own, without = (maskgen.prune(prune(dense, text_file, tmp_path / f"{bos}", bos=bos)) for bos in (None, False))
    assert isinstance(own, maskgen.PruneResult) and own.bos == Bos((2,), True)
    assert isinstance(without, maskgen.PruneResult) and without.bos == Bos((), True)
    one, two = (SparseCheckpoint.open(result.out).config for result in (own, without))
    assert one.recipe_digest == two.recipe_digest and one.mask_digest != two.mask_digest

    learned = maskgen.learn(learn(dense, text_file, tmp_path / "learned"))
    assert isinstance(learned, maskgen.LearnResult) and learned.records[0]["bos"] == {"ids": [2], "own": True}
    scored = maskgen.evaluate(maskgen.EvaluateRequest(model=dense, data=text_file, window_tokens=16, max_windows=2))
    assert [window.ids[0] for window in scored.windows] == [2, 2] and scored.perplexity.protocol.bos
    assert "BOS in each (as the tokenizer does by itself)" in scored.perplexity.protocol.describe()
    (tmp_path / "short.txt").write_text("tiny", "utf-8")
    with pytest.raises(
        DataError, match=r"^short\.txt: text of \d tokens: shorter than one window of 16; give more text"
    ):
        maskgen.evaluate(maskgen.EvaluateRequest(model=dense, data=tmp_path / "short.txt", window_tokens=16))
    plain = maskgen.EvaluateRequest(model=dense, data=text_file, window_tokens=16, max_windows=2, bos=False)
    assert not maskgen.evaluate(plain).perplexity.protocol.bos


def test_windows_are_no_longer_than_the_model_reads_unless_it_is_said(text_file: Path, tmp_path: Path) -> None:
    dense = models.save("llama", tmp_path / "dense")
    scored = maskgen.evaluate(maskgen.EvaluateRequest(model=dense, data=text_file, max_windows=1))
    assert scored.perplexity.protocol.window_tokens == models.MAX_TOKENS
    with pytest.raises(DataError, match=f"window of 2048 tokens, but the model reads at most {models.MAX_TOKENS}"):
        maskgen.evaluate(maskgen.EvaluateRequest(model=dense, data=text_file, window_tokens=2048))

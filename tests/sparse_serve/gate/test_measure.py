"""Scoring windows through an engine, against numbers worked out by hand."""

import json
from pathlib import Path

import pytest

from maskgen.core.perplexity import Protocol, digest_windows
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.gate.measure import Request, measure_offline, score_windows
from sparse_serve.gate.plan import default_window, stored_dtype
from sparse_serve.runtime.errors import GateError, SettingsError
from tests import models


async def test_score_windows_counts_only_scored_tokens() -> None:
    """The fake engine's log-probability of token t is -t/1000."""
    protocol = Protocol(window_tokens=4, stride_tokens=2)
    windows = protocol.windows(list(range(100, 108)))
    result = await score_windows(FakeEngine(), windows, protocol)
    assert result.nll_per_window == pytest.approx([0.102, 0.1045, 0.1065])
    assert result.scored_tokens_per_window == [3, 2, 2]
    assert result.tokens_digest == digest_windows(windows)


async def test_a_score_that_is_not_a_number_is_an_error_not_a_verdict() -> None:
    class Broken(FakeEngine):
        async def score(self, token_ids: list[int]) -> list[float]:
            return [float("nan")] * (len(token_ids) - 1)

    protocol = Protocol(window_tokens=4)
    with pytest.raises(GateError, match="mean log-probability of a window is nan"):
        await score_windows(Broken(), protocol.windows(list(range(8))), protocol)


def test_offline_failure_is_one_clear_error(tmp_path: Path) -> None:
    text = tmp_path / "none.txt"
    with pytest.raises(GateError, match="offline evaluation failed: maskgen: error: "):
        measure_offline(tmp_path, text, Request((text,), 4, "float32"), tmp_path)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"max_position_embeddings": 1024}, 512),
        ({"max_position_embeddings": 131072}, 2048),
        ({}, 2048),
        ({"max_position_embeddings": True}, 2048),
    ],
)
def test_default_window(config: dict, window: int) -> None:
    assert default_window(json.loads(json.dumps(config))) == window


def test_stored_dtype_reads_both_spellings_and_refuses_others() -> None:
    assert stored_dtype({"dtype": "float32"}) == "float32"
    assert stored_dtype({"torch_dtype": "bfloat16"}) == "bfloat16"
    with pytest.raises(SettingsError, match="'int8'; give a dtype"):
        stored_dtype({"dtype": "int8"})


@pytest.mark.parametrize(("bos", "begins"), [(None, True), (False, False)])
def test_windows_of_a_model_that_wants_bos_have_it_on_both_stacks(
    bos: bool | None, begins: bool, tmp_path: Path
) -> None:
    """The offline side decides; the engine is given its windows, as token ids to which nothing is added."""
    dense = models.save("llama", tmp_path / "dense", tokens=models.bos_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(models.TEXT[:400], "utf-8")
    request = Request((text,), 16, "float32", max_windows=2, bos=bos)
    measured = measure_offline(dense, text, request, tmp_path)
    offline, windows = measured.perplexity, measured.windows
    assert (offline.protocol.bos, offline.protocol.own_bos) == (begins, True)
    assert [window.ids[0] == 2 for window in windows] == [begins] * 2
    assert [len(window.ids) for window in windows] == [16] * 2
    assert offline.tokens_digest == digest_windows(windows)

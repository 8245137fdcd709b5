"""Figures of a turn, from what vLLM's load generator reports and servers print."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_serve.bench.field_result import code_of, turn_of
from sparse_serve.runtime.errors import BenchError, UnsupportedError
from sparse_serve.runtime.load import Load, reason_of


def report(load: Load, ttft_s: float, gap_s: float) -> dict[str, Any]:
    return {
        "ttfts": [ttft_s] * load.prompts,
        "itls": [[gap_s] * (load.output_tokens - 1)] * load.prompts,
        "duration": 1.0,
        "completed": load.prompts,
    }


def test_figures_of_a_turn_do_not_depend_on_how_tokens_are_cut_into_pieces() -> None:
    load = Load(2, 1, 8, 5)
    whole = report(load, 0.5, 0.1)
    with_an_end = whole | {"itls": [[0.1, 0.1, 0.1, 0.1, 0.001]] * 2}
    two_at_a_time = whole | {"itls": [[0.1, 0.3]] * 2}
    for found in (whole, with_an_end, two_at_a_time):
        turn = turn_of("a", 0, load, found, 0.0)
        assert (turn.ttft_ms, turn.tpot_ms) == (pytest.approx(500), pytest.approx(100))
        assert turn.decode_tokens_per_s == pytest.approx(20) and turn.decodes


def test_tokens_that_a_client_reads_in_one_go_have_no_speed() -> None:
    load = Load(1, 2, 8, 5)
    with pytest.raises(BenchError, match="a: 5 tokens came all at once; ask for more --output-tokens"):
        turn_of("a", 0, load, report(load, 0.5, 1e-6), 0.0)
    first = Load(1, 2, 8, 2)
    assert turn_of("a", 0, first, report(first, 0.5, 1e-6), 0.0).ttft_ms == pytest.approx(500), "only the first counts"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("config: enforce_eager=True, ...", "eager"),
        ("config: enforce_eager=False, ...", "compiled"),
        ("built for CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | OPENMP = 1 | \n  HTTP", "built for SSE3 AVX2 OPENMP"),
        ("", "unknown"),
    ],
)
def test_how_a_model_runs_is_read_from_what_its_server_said(said: str, code: str) -> None:
    assert code_of(said) == code


def test_a_reason_is_one_line() -> None:
    assert reason_of(UnsupportedError("no gguf")) == "no gguf"
    log = "vLLM W8A8 ended with 1; the end of /tmp/x/server.log:\n  first\n  RuntimeError: last"
    assert reason_of(BenchError(log)) == "vLLM W8A8 ended with 1: RuntimeError: last"

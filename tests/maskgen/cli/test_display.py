"""What a person sees in the end: closing lines, and numbers that can be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from maskgen.cli import display
from maskgen.export.compress import CompressReport
from tests.maskgen.cli.test_progress import LOOK, STEP


def test_a_result_no_smaller_than_dense_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = CompressReport(2, 100, 57, 80), CompressReport(2, 100, 135, 160)
    display.print_compressed(Path("out"), small)
    assert "no less than dense" not in capsys.readouterr().out
    display.print_compressed(Path("out"), large)
    assert "no less than dense; a correction of a lower rank" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "where"), [("cpu", "host"), ("cuda:0", "GPU")])
def test_the_summary_of_a_training_run(capsys: pytest.CaptureFixture[str], device: str, where: str) -> None:
    last = dataclasses.replace(LOOK, step=2, perplexity=51.25, agreement=0.9, elapsed_s=125.0)
    log = [
        {"kind": "header", "hardware": {"device": device}},
        {"kind": "eval", **dataclasses.asdict(LOOK)},
        {"kind": "step", **dataclasses.asdict(STEP)},
        {"kind": "step", **dataclasses.asdict(STEP)},
        {"kind": "eval", **dataclasses.asdict(last)},
    ]
    display.print_training(log, Path("out/log.jsonl"))
    assert capsys.readouterr().out.splitlines() == [
        "held-out perplexity 54.60 at the start -> 51.25; dense 49.40",
        f"  2 steps, 8,192 tokens, 2:05, peak memory of the {where} 700.0 MB",
        "  90.00% of the mask is as it was at the start; log in out/log.jsonl",
    ]

"""What a person sees of measurements."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from maskgen.api.measuring import EvaluateResult, TextResult
from maskgen.cli import measured
from maskgen.core.divergence import Divergence
from maskgen.core.perplexity import Perplexity, Protocol, Window
from maskgen.core.quality import read_quality
from tests.maskgen.cli.test_parser import SMALL, run

ModelDir = Callable[..., Path]


def test_an_evaluation_of_several_texts_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    def text(name: str, nll: float) -> TextResult:
        dense, sparse = (Perplexity(Protocol(8), [value], [7], "sha256:0") for value in (1.0, nll))
        return TextResult(name, sparse, [Window([0] * 8, 1)], dense, Divergence([nll / 4], [0.625], [7]))

    measured.print_evaluated(EvaluateResult("sparse", "bfloat16", [text("a.txt", 2.0), text("b.txt", 3.0)], "base"))
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert rows == [
        ["a.txt", "1", "7.3891", "2.7183", "0.5000", "62.50%"],
        ["b.txt", "1", "20.0855", "2.7183", "0.7500", "62.50%"],
    ]
    assert "2 windows, 14 scored tokens, window 8, non-overlapping" in shown and "dense: base" in shown

    measured.print_evaluated(EvaluateResult("sparse", "bfloat16", [text("a.txt", 2.0)]))
    assert capsys.readouterr().out.startswith("perplexity 7.3891\n")


def test_a_run_ends_with_its_quality_and_inspect_shows_it_again(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, _ = run(capsys, "run", "wanda", "--model", model_dir(), "--data", text_file, "--out", out, *SMALL)
    quality = read_quality(out)
    assert code == 0 and quality is not None
    said = [f"quality: {quality.describe()}", *(f"  {line}" for line in quality.lines()[1:])]
    assert text.splitlines()[-len(said) :] == said
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0 and text.splitlines()[-len(said) :] == said
    code, text, _ = run(capsys, "quantise", out, "--values", "int8", "--out", tmp_path / "int8")
    assert code == 0 and f"(of {out} it was measured with other values)" in text
    said = next(line for line in text.splitlines() if line.startswith("quality: not known; "))
    _, inspected, _ = run(capsys, "inspect", tmp_path / "int8")
    assert inspected.splitlines()[-1] in said
    (command,) = re.findall(r"`maskgen (.*?)`", said)
    words = [{"DENSE": model_dir(), "TEXT": text_file}.get(word, word) for word in command.split()]
    code, text, _ = run(capsys, *words, "--window", 32, "--max-windows", 3)
    quality = read_quality(tmp_path / "int8")
    assert code == 0 and quality is not None and quality.describe() in text
    _, inspected, _ = run(capsys, "inspect", tmp_path / "int8")
    assert quality.describe() in inspected, "the advice was true"


def test_a_run_without_text_says_how_to_get_a_number(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(capsys, "run", "magnitude", "--model", model_dir(), "--out", tmp_path / "out")
    last = text.splitlines()[-1]
    assert code == 0 and last.startswith("quality: not measured: no text was given; with --data, held-out perplexity")

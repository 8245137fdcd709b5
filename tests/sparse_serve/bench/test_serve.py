"""`sparse-serve bench serve` without models: what reports mean, ratios, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from maskgen.core.errors import FormatError
from sparse_serve.bench import serve
from sparse_serve.bench.serve import METRICS, MODELS, Run, check, compare, figures
from sparse_serve.cli import main as cli
from sparse_serve.cli.bench import serve_table
from sparse_serve.runtime import environment
from sparse_serve.runtime.errors import BenchError, SettingsError
from tests import models

REPORT: dict[str, Any] = {
    "completed": 6,
    "failed": 0,
    "total_output_tokens": 48,
    "output_throughput": 70.0,
    "median_ttft_ms": 30.0,
    "median_tpot_ms": 25.0,
    "errors": [""] * 6,
}


def test_figures_of_a_report() -> None:
    values = {"decode_tokens_per_s": 80.0, "output_tokens_per_s": 70.0, "ttft_ms": 30.0, "tpot_ms": 25.0}
    assert figures(REPORT, clients=2) == values
    assert [metric.name for metric in METRICS] == list(values)


def run(model: str, number: int, clients: int, tpot_ms: float) -> Run:
    return Run(model, number, clients, figures(REPORT | {"median_tpot_ms": tpot_ms}, clients), {})


def test_ratios_are_within_rounds_and_above_one_where_sparse_is_better() -> None:
    tpot_ms = {"dense": [30.0, 20.0, 60.0], "sparse": [15.0, 20.0, 20.0]}
    runs = [run(model, number, 4, values[number]) for number in (2, 0, 1) for model, values in tpot_ms.items()]
    compared = {row.metric.name: row for row in compare(runs)}
    decode, tpot, ttft = (compared[name] for name in ("decode_tokens_per_s", "tpot_ms", "ttft_ms"))
    assert (tpot.dense, tpot.sparse, tpot.ratios, tpot.ratio) == (30.0, 20.0, [2.0, 1.0, pytest.approx(3.0)], 2.0)
    assert (decode.dense, decode.sparse) == (pytest.approx(4e3 / 30), 200.0)
    assert decode.ratios == pytest.approx(tpot.ratios)
    assert ttft.ratios == [1.0] * 3


def test_the_table_has_a_section_per_load_and_shows_where_sparse_is_worse() -> None:
    runs = [run(model, 0, clients, 10.0 * (1 + MODELS.index(model))) for clients in (1, 8) for model in MODELS]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(serve_table(compare(runs)))
    plain = console.export_text(clear=False)
    lines = [line.split() for line in plain.splitlines() if "decode" in line]
    assert lines == [
        ["1", "decode,", "tokens/s", "100.0", "50.0", "0.50x"],
        ["8", "decode,", "tokens/s", "800.0", "400.0", "0.50x"],
    ]
    assert "\x1b[31m0.50x" in console.export_text(styles=True)


@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        ({"quantization_config": {}}, {}, "--dense .* has a quantization_config; expected a dense model"),
        ({}, {}, "--sparse .* has no quantization_config; expected a sparse model"),
        (
            {"hidden_size": 8, "dtype": "bfloat16"},
            {"hidden_size": 9, "quantization_config": {}},
            "differ in dtype, hidden_size of config.json; expected one model twice",
        ),
    ],
)
def test_two_models_that_cannot_be_compared(
    tmp_path: Path, dense: dict[str, Any], sparse: dict[str, Any], message: str
) -> None:
    for name, config in (("dense", dense), ("sparse", sparse)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=message):
        check(tmp_path / "dense", tmp_path / "sparse")
    (tmp_path / "dense/config.json").rename(tmp_path / "dense/adapter_config.json")
    with pytest.raises(FormatError, match="dense: an adapter of None, not a model; merge it"):
        check(tmp_path / "dense", tmp_path / "sparse")


def test_the_environment_is_left_as_it_was_when_a_server_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leaders = []

    def refuses(directory: Path, flags: list[str], work_dir: Path) -> NoReturn:
        leaders.append(environment.leader())
        shutil.rmtree(work_dir)
        raise BenchError("no server")

    monkeypatch.setattr(serve, "check", lambda dense, sparse: None)
    monkeypatch.setattr(serve, "serving", refuses)
    before = dict(os.environ)
    with pytest.raises(BenchError, match="no server"):
        serve.run(serve.ServeRequest(dense=tmp_path, sparse=tmp_path))
    assert leaders == [os.getpid()] and dict(os.environ) == before


@contextlib.contextmanager
def up(directory: Path, flags: list[str], work_dir: Path) -> Iterator[str]:
    yield f"http://{directory.name}"


@pytest.mark.parametrize(("fails_at", "rounds"), [(0, 0), (3, 0), (4, 1), (9, 2)])
def test_rounds_before_one_that_fails_count(
    fails_at: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def load(url: str, *words: object) -> dict[str, Any]:
        asked.append(url)
        if len(asked) > fails_at:
            raise BenchError(f"{url}: gone; the end of {tmp_path}/load.log:\n  first\n  last words")
        return REPORT

    monkeypatch.setattr(serve, "serving", up)
    monkeypatch.setattr(serve, "bench_serve", load)
    models.save("llama", tmp_path / "dense")
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    flags = ["--dense", str(tmp_path / "dense"), "--sparse", str(tmp_path / "sparse"), "--rounds", "3"]
    file = tmp_path / "figures.json"
    assert cli.main(["bench", "serve", *flags, "--json", str(file)]) == 2
    said = capsys.readouterr()
    assert "gone; the end of" in said.err and "last words" in said.err
    assert file.exists() == (rounds > 0)
    if rounds:
        written = json.loads(file.read_text())
        assert {run["round"] for run in written["runs"]} == set(range(rounds)) and len(written["runs"]) == 4 * rounds
        assert written["failed"].endswith(": gone: last words") and str(tmp_path) not in written["failed"]
        assert f"(rounds: {rounds})" in said.out


def test_a_checkpoint_of_maskgen_is_compared_with_its_dense_model(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense")
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    check(tmp_path / "dense", tmp_path / "sparse")

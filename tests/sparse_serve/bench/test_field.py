"""Servers in turns, without vLLM: who goes on, what is computed of reports, tables and the record."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparse_serve.bench import field as race
from sparse_serve.bench import peers
from sparse_serve.bench.field import FieldRequest
from sparse_serve.bench.field_report import DECODE, TTFT, compare, record
from sparse_serve.bench.field_result import Entry, Result, Turn
from sparse_serve.bench.peers import Conditions, Contender
from sparse_serve.cli import field as shown
from sparse_serve.cli import main as cli
from sparse_serve.gate.evidence import HostReading
from sparse_serve.runtime import processes
from sparse_serve.runtime.errors import BenchError, SettingsError, UnsupportedError
from sparse_serve.runtime.load import Load
from tests import models
from tests.bench import schema
from tests.sparse_serve.bench.test_field_result import report

SERVER = """
import sys, time
print("enforce_eager=False", file=sys.stderr, flush=True)
if sys.argv[1] == "fails": sys.exit("ValueError: no such layer")
print("\\n  HTTP  http://127.0.0.1:1\\n", flush=True)
time.sleep(600)
"""
SMALL: dict[str, Any] = {"clients": (1, 2), "requests": 2, "input_tokens": (8, 16), "output_tokens": 9, "rounds": 2}


def test_loads_of_a_turn() -> None:
    request = FieldRequest(dense=Path("d"), sparse=(Path("s"),), **SMALL)
    assert request.loads() == [Load(1, 2, 8, 9), Load(2, 2, 8, 9), Load(1, 2, 16, 2)]
    assert request.context_tokens == 16 + 9 + race.SLACK_TOKENS
    many = FieldRequest(dense=Path("d"), sparse=(Path("s"),), **SMALL | {"clients": (4,)})
    assert many.loads() == [Load(4, 2, 8, 9), Load(1, 2, 8, 2), Load(1, 2, 16, 2)], "one client waits for first tokens"


@dataclass
class Servers:
    """Stubs in the place of servers, and what loads they were under: (server, clients, tokens), in order."""

    folder: Path
    sizes: dict[str, float]
    """Seconds per token, by server."""
    fails: Callable[[str, int], bool] = lambda name, asked: False
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)

    def contender(self, name: str, is_ours: bool, mode: str = "works") -> Contender:
        url = f"http://{name}"
        self.urls[url] = name
        command = [sys.executable, "-c", SERVER, mode]
        return Contender(name, is_ours, self.folder, command, {}, lambda said: url if "HTTP" in said else None)

    def ours(self, sparse: Sequence[Path], conditions: Conditions) -> list[Contender]:
        assert (conditions.threads, conditions.slots) == (2, 2)
        return [self.contender("2:4", True)]

    def peer(self, name: str, dense: Path, layers: Sequence[str], conditions: Conditions) -> Contender:
        if name == "w4a16":
            raise UnsupportedError("not here")
        return self.contender(name, False, "fails" if name == "llama.cpp:q8_0" else "works")

    def load(
        self, url: str, tokenizer: Path, load: Load, seed: int, work_dir: Path, model: str, generator: Any
    ) -> dict[str, Any]:
        name = self.urls[url]
        assert model == f"model of {url}"
        self.asked.append((name, load.clients, load.input_tokens))
        if self.fails(name, len(self.asked)):
            raise BenchError(f"vllm bench serve on {url}: it is gone")
        return report(load, 10 * self.sizes[name], self.sizes[name])


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Servers:
    models.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    made = Servers(tmp_path / "dense", {"2:4": 0.1, "bf16": 0.2, "w8a8": 0.05})

    @contextlib.contextmanager
    def generator(work_dir: Path) -> Iterator[None]:
        yield None

    monkeypatch.setattr(peers, "ours", made.ours)
    monkeypatch.setattr(peers, "peer", made.peer)
    monkeypatch.setattr(race, "bench_serve", made.load)
    monkeypatch.setattr(peers, "served_name", lambda url: f"model of {url}")
    monkeypatch.setattr(race, "load_generator", generator)
    monkeypatch.setattr(race, "_START_BYTES", 0)
    return made


def request_of(tmp_path: Path, *names: str) -> FieldRequest:
    more = {"peers": names, "threads": 2, "keep_peers": tmp_path / "kept", **SMALL}
    return FieldRequest(dense=tmp_path / "dense", sparse=(tmp_path / "sparse",), **more)


def test_who_cannot_be_had_is_left_out_with_its_reason_and_the_rest_go_on(servers: Servers, tmp_path: Path) -> None:
    told: list[str] = []
    request = request_of(tmp_path, "bf16", "w4a16", "llama.cpp:q8_0", "w8a8")
    result = race.run(request, told.append)
    assert [entry.name for entry in result.entries] == ["2:4", "bf16", "w8a8"]
    assert result.refused == {
        "w4a16": "not here",
        "llama.cpp:q8_0": "llama.cpp:q8_0 ended with 1: ValueError: no such layer",
    }
    assert any("ValueError: no such layer" in line for line in told)
    turns = [(1, 8), (2, 8), (1, 16)]
    orders = [["2:4", "bf16", "w8a8"], ["bf16", "w8a8", "2:4"]]
    assert servers.asked == [(name, *turn) for order in orders for name in order for turn in turns]
    assert all(entry.code == "compiled" and entry.start_s > 0 for entry in result.entries)
    assert all(entry.weights.startswith("sha256:") for entry in result.entries)
    assert len(result.hosts) == 2 and max(turn.idle_share for turn in result.turns) < 1

    rows = compare(result)
    assert [(row.metric, row.clients, row.input_tokens) for row in rows] == [
        (DECODE, 1, 8),
        (DECODE, 2, 8),
        (TTFT, 1, 8),
        (TTFT, 1, 16),
    ]
    assert rows[1].medians == {name: pytest.approx(2 / size) for name, size in servers.sizes.items()}
    for row in rows:
        assert row.ratios["2:4"]["bf16"] == pytest.approx([2.0] * 2)
        assert row.ratios["2:4"]["w8a8"] == pytest.approx([0.5] * 2)

    written = json.loads(json.dumps(record(request, result)))
    wrong = {"commit"} if written["commit"] is None or "dirty" in written["commit"] else set()
    assert set(schema.lacks(written)) == wrong
    assert written["inputs"].keys() == {"dense", "sparse 1"} and str(tmp_path) not in json.dumps(written)
    assert written["refused"] == result.refused and len(written["turns"]) == 18

    console = Console(record=True, width=200, file=io.StringIO())
    shown.show(result, rows, console)
    text = console.export_text(clear=False)
    assert "without w4a16: not here" in text and "2:4" in text
    assert "\x1b[31m0.50x" in console.export_text(styles=True) and "2.00x" in text


def test_a_peer_that_breaks_later_is_left_out_whole(servers: Servers, tmp_path: Path) -> None:
    running: list[int] = []

    def fails(name: str, asked: int) -> bool:
        running.append(len(processes.descendants(os.getpid())))
        return name == "bf16" and asked > 9

    servers.fails = fails
    result = race.run(request_of(tmp_path, "bf16", "w8a8"))
    assert result.refused == {"bf16": "vllm bench serve on http://bf16: it is gone"}
    assert {turn.name for turn in result.turns} == {"2:4", "w8a8"}
    assert running[-1] == running[0] - 1, "it does not go on beside the others"
    assert compare(result)[0].ratios == {"2:4": {"w8a8": pytest.approx([0.5] * 2)}}


def test_one_of_ours_that_fails_counts_in_the_rounds_before(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other of ours goes on; the log of what failed stays, and what peers were made into does not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(peers, "ours", lambda *_: [servers.contender(name, True) for name in ("2:4", "other")])
    servers.sizes["other"] = 0.4
    servers.fails = lambda name, asked: name == "2:4" and asked > 9
    flags = ["--dense", str(tmp_path / "dense"), "--sparse", str(tmp_path / "sparse"), "--peers", "bf16"]
    flags += ["--clients", "1,2", "--requests", "2", "--input-tokens", "8,16", "--output-tokens", "9", "--rounds", "2"]
    with _handlers_kept():
        assert cli.main(["bench", "serve", *flags, "--json", str(tmp_path / "all.json")]) == 2
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["failed"] == {"2:4": "round 2: vllm bench serve on http://2:4: it is gone"}
    for row in written["results"]:
        assert [row["ratios"][name]["bf16"] for name in ("2:4", "other")] == [
            pytest.approx([2.0]),
            pytest.approx([0.5] * 2),
        ]
    said = capsys.readouterr()
    assert "2:4 failed in round 2: vllm bench serve" in said.err
    assert "sparse-serve: error: 2:4 failed in round 2: vllm bench serve on http://2:4: it is gone" in said.err
    assert "how many times better ours is" in said.out
    (kept,) = (tmp_path / "temporary").iterdir()
    assert (kept / "server-0.log").is_file()


def test_the_run_ends_when_none_of_ours_is_left(servers: Servers, tmp_path: Path) -> None:
    servers.fails = lambda name, asked: name == "2:4" and asked > 6
    result = race.run(request_of(tmp_path, "bf16").model_copy(update={"rounds": 4}))
    assert {(turn.name, turn.round) for turn in result.turns} == {("2:4", 0), ("bf16", 0), ("bf16", 1)}
    assert list(result.failed) == ["2:4"]


def test_without_ours_there_is_nothing_to_compare(servers: Servers, tmp_path: Path) -> None:
    servers.fails = lambda name, asked: name == "2:4"
    with pytest.raises(BenchError, match="it is gone"):
        race.run(request_of(tmp_path, "bf16"))


def test_a_server_that_would_not_fit_is_not_started(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race.machine, "available_bytes", lambda: 10**5)
    with pytest.raises(BenchError, match=r"0\.0 GB of memory are free beside the servers that run, too few for 2:4"):
        race.run(request_of(tmp_path, "bf16"))


def test_what_cannot_be_measured_is_said_before_anything_starts(servers: Servers, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--peers awq: no such peer; known are bf16, w8a8, w4a16, w4a8, llama"):
        race.run(request_of(tmp_path, "awq"))
    long = request_of(tmp_path, "bf16").model_copy(update={"input_tokens": (8, 100)})
    with pytest.raises(
        SettingsError, match="--input-tokens 100 with --output-tokens 9 and 64 to spare is more than the 128"
    ):
        race.run(long)
    assert servers.asked == []


def test_rounds_that_only_one_was_in_do_not_count() -> None:
    def turn(name: str, number: int, tpot_ms: float) -> Turn:
        return Turn(name, number, Load(1, 1, 8, 9), 1.0, tpot_ms, 0.0)

    turns = [turn("2:4", 0, 10.0), turn("2:4", 1, 20.0), turn("bf16", 1, 60.0)]
    entries = [Entry(name, name == "2:4", 1.0, None, 1, "", "eager") for name in ("2:4", "bf16")]
    found = Result(entries, {}, turns, [HostReading(0.0, 0.5, (1.0,))])
    assert compare(found)[0].ratios == {"2:4": {"bf16": [pytest.approx(3.0)]}}
    console = Console(record=True, width=200, file=io.StringIO())
    shown.show(found, compare(found), console)
    assert "round 1 was disturbed: other processes used 50 % of the processors" in console.export_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparse", "b", "c"], "--sparse b c: only with --peers"),
        (["--sparse", "b", "--input-tokens", "8,16"], "--input-tokens 8 16: only with --peers"),
        (["--sparse", "b", "--threads", "2"], "--threads 2: only with --peers"),
        (["--sparse", "b", "--keep-peers", "k"], "--keep-peers k: only with --peers"),
        (["--sparse", "b", "--int8-activations"], "--int8-activations: only with --peers"),
        (["--sparse", "b", "--peers", "bf16", "--dtype", "float32"], "--dtype float32: peers compute in bfloat16"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", "--dense", "a", *flags]) == 2
    assert f"sparse-serve: error: {message}" in capsys.readouterr().err


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_server_that_was_started_and_whole_rounds_are_kept(
    end: signal.Signals, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_to_end(*words: Any) -> dict[str, Any]:
        if len(servers.asked) == 4:  # two servers under two loads are a round
            os.kill(os.getpid(), end)
        return servers.load(*words)

    monkeypatch.setattr(race, "bench_serve", told_to_end)
    before = processes.descendants(os.getpid())
    flags = ["--dense", str(tmp_path / "dense"), "--sparse", str(tmp_path / "sparse"), "--peers", "bf16"]
    flags += ["--clients", "1,2", "--output-tokens", "9", "--input-tokens", "8", "--threads", "2", "--rounds", "2"]
    with _handlers_kept(), pytest.raises(SystemExit) as ended:
        cli.main(["bench", "serve", *flags, "--json", str(tmp_path / "found.json")])
    assert ended.value.code == 128 + end
    assert processes.descendants(os.getpid()) <= before
    turns = json.loads((tmp_path / "found.json").read_text())["turns"]
    assert [(turn["name"], turn["round"]) for turn in turns] == [("2:4", 0), ("2:4", 0), ("bf16", 0), ("bf16", 0)]

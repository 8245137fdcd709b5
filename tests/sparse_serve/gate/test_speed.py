"""Rounds of speed: their order, when they end, and what becomes of a report of the load generator."""

from pathlib import Path
from typing import Any

import pytest

from sparse_serve.gate import speed
from sparse_serve.gate.checks.speed import LOOKS
from sparse_serve.gate.config import SpeedConfig
from sparse_serve.gate.evidence import Evidence, HostReading, Limits
from sparse_serve.gate.host import HostWatch
from sparse_serve.gate.plan import plan
from sparse_serve.gate.speed import Served, rounds, to_run
from sparse_serve.gate.verdict import Verdict, worst
from sparse_serve.runtime.errors import BenchError, GateError, SettingsError
from sparse_serve.runtime.load import Load
from tests.sparse_serve.gate.test_config import GOOD, GateConfig

TARGETS = {
    "base": Served("http://127.0.0.1:1", "m", Path("tokenizer")),
    "candidate": Served("http://127.0.0.1:2", "m", Path("tokenizer")),
}
CONFIG = SpeedConfig(clients=[1, 2], requests=2, input_tokens=4, output_tokens=3, metrics=["ttft_p50", "throughput"])


def report(load: Load, factor: float = 1.0) -> dict[str, Any]:
    """What `vllm bench serve` says of a load, in seconds."""
    prompts = load.prompts
    return {
        "completed": prompts,
        "ttfts": [0.1 * factor] * prompts,
        "itls": [[0.02 * factor] * (load.output_tokens - 1)] * prompts,
        "duration": factor,
        "total_output_tokens": prompts * load.output_tokens,
    }


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostWatch, "read", lambda self: HostReading(0.0, 0.0, (0.001,)))


def test_rounds_are_base_candidate_candidate_base_until_decided() -> None:
    asked: list[tuple[str, int, int]] = []

    def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
        asked.append((served.url[-1], load.clients, seed))
        return report(load, 1.2 if served.url.endswith("2") else 1.0)

    found = rounds(TARGETS, CONFIG, Limits(), run_load, lambda what: None)
    targets = [(url, clients) for url, clients, _ in asked]
    assert targets[:4] == [("1", 1), ("2", 1), ("1", 2), ("2", 2)], "a warm-up that is not kept"
    assert targets[4:8] == [("1", 1), ("2", 1), ("2", 1), ("1", 1)]
    assert targets[8:12] == [("1", 2), ("2", 2), ("2", 2), ("1", 2)]
    assert len(set(asked)) == len(asked), "a server that keeps what it has read never sees prompts twice"
    prompts = [seed for _, _, seed in asked[4:]]
    assert prompts[0::4] == prompts[1::4] and prompts[2::4] == prompts[3::4], "the base gets the candidate's prompts"
    assert [round.number for round in found.rounds] == [0, 0, 1, 1, 2, 2, 3, 3], "decided at the first look"
    assert len(found.rounds[0].runs[0].itl_ms) == 4
    assert found.rounds[1].runs[1].e2e_ms == pytest.approx([1.2 * 140.0] * 4)


def test_disturbed_rounds_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    steal = iter([0.5, 0.0, 0.0, 0.5, 0.0, 0.0])
    monkeypatch.setattr(HostWatch, "read", lambda self: HostReading(next(steal), 0.0, (0.001,)))

    def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
        return report(load, 1.2 if served.url.endswith("2") else 1.0)

    one_load = CONFIG.model_copy(update={"clients": [1]})
    found = rounds(TARGETS, one_load, Limits(), run_load, lambda what: None)
    assert len(found.rounds) == 6, "four that were not disturbed"


def test_a_server_that_is_both_targets_never_sees_prompts_twice() -> None:
    seeds: list[int] = []

    def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
        seeds.append(seed)
        return report(load)

    rounds(dict.fromkeys(TARGETS, TARGETS["base"]), CONFIG, Limits(), run_load, lambda what: None)
    assert len(set(seeds)) == len(seeds) > 16


def test_rounds_end_with_the_budget_and_at_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])

    def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
        now[0] += 1.0
        return report(load, 1 + (now[0] * 7919 % 13) / 10)  # too noisy to decide

    one_load = CONFIG.model_copy(update={"clients": [1], "budget_s": 42.0})
    found = rounds(TARGETS, one_load, Limits(), run_load, lambda what: None)
    assert len(found.rounds) == 10, "2 s of warm-up, 4 s a round"
    found = rounds(TARGETS, one_load.model_copy(update={"budget_s": 1e9}), Limits(), run_load, lambda what: None)
    assert len(found.rounds) == LOOKS[-1]


def test_a_load_that_fails_is_no_verdict() -> None:
    def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
        raise BenchError("the server is gone")

    with pytest.raises(BenchError, match="the server is gone"):
        rounds(TARGETS, CONFIG, Limits(), run_load, lambda what: None)


def test_a_report_without_its_samples_is_an_error() -> None:
    load = Load(1, 2, 4, 3)
    assert to_run("base", report(load), load).failed == 0
    whole, empty = report(load), report(load) | {"itls": [[0.02, 0.02, 0.0]] * 2, "total_output_tokens": 5}
    assert to_run("base", empty, load) == to_run("base", whole, load), "a last chunk without a token is no gap"
    for missing in ("ttfts", "itls", "duration", "completed"):
        broken = {name: value for name, value in report(load).items() if name != missing}
        with pytest.raises(GateError, match=f"lacks what is judged: KeyError\\('{missing}'\\)"):
            to_run("base", broken, load)


def test_a_round_in_which_requests_failed_is_an_error() -> None:
    def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
        return report(load) | ({"completed": 1} if seed > 3 else {})

    found = rounds(TARGETS, CONFIG, Limits(), run_load, lambda what: None)
    assert worst(speed.check.run(Evidence(speed=found), Limits())) is Verdict.ERROR


def test_the_host_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    watch = HostWatch()
    watch.probe()
    watch.probe()
    reading = watch.read()
    assert 0 <= reading.steal <= 1 and 0 <= reading.foreign <= 1
    assert len(reading.probe_s) == 2 and min(reading.probe_s) > 0


def test_the_process_behind_an_address_is_found() -> None:
    assert speed.listening_process("http://example.invalid:80") is None
    assert speed.listening_process("http://127.0.0.1:1") is None


def test_speed_needs_a_tokenizer() -> None:
    both = {**GOOD, "base": {"url": "http://127.0.0.1:1"}, "quality": None}
    with pytest.raises(SettingsError, match=r"base\.tokenizer: missing"):
        plan(GateConfig.of(both))
    with pytest.raises(SettingsError, match=r"base\.tokenizer: nowhere: no such directory"):
        plan(GateConfig.of(both | {"base": {"url": "http://127.0.0.1:1", "tokenizer": "nowhere"}}))

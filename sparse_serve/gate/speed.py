"""Measuring speed: rounds of base, candidate, candidate, base under `vllm bench serve`, until decided.

Both servers are up all the time; only one of them is under load. Before the first round each is run once under each
load, and that is not kept. Rounds of all loads are added, and judged after the numbers of undisturbed rounds in
`checks.speed.LOOKS`, until no metric is undecided or the time is up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from sparse_serve.gate.checks import speed as check
from sparse_serve.gate.config import SpeedConfig
from sparse_serve.gate.evidence import Evidence, Limits, SpeedEvidence, SpeedRound, SpeedRun
from sparse_serve.gate.host import HostWatch
from sparse_serve.gate.verdict import Verdict
from sparse_serve.runtime.errors import GateError
from sparse_serve.runtime.load import Load, bench_serve, load_generator

ORDER = ("base", "candidate", "candidate", "base")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Served:
    """A running server, the model to ask it for and the tokenizer that makes prompts.

    `gpu_bytes` is what its start took of the GPUs, None if that is not known.
    """

    url: str
    model: str
    tokenizer: Path
    gpu_bytes: int | None = None


RunLoad = Callable[[Served, Load, int], dict[str, Any]]
"""Puts a server under a load with a seed, and returns the report of `vllm bench serve` with its lists."""


def measure(
    targets: Mapping[str, Served], config: SpeedConfig, limits: Limits, work_dir: Path, on_round: Callable[[str], None]
) -> SpeedEvidence:
    """Measure until decided or for `config.budget_s` seconds. Raises `BenchError` if a run or a request failed."""

    with load_generator(work_dir) as run:

        def run_load(served: Served, load: Load, seed: int) -> dict[str, Any]:
            return bench_serve(served.url, served.tokenizer, load, seed, work_dir, served.model, run)

        return rounds(targets, config, limits, run_load, on_round)


def rounds(
    targets: Mapping[str, Served],
    config: SpeedConfig,
    limits: Limits,
    run_load: RunLoad,
    on_round: Callable[[str], None],
) -> SpeedEvidence:
    """The rounds, with any load generator."""
    until = time.monotonic() + config.budget_s
    loads = [Load(clients, config.requests, config.input_tokens, config.output_tokens) for clients in config.clients]
    seeds = itertools.count()  # no prompt twice on a server, which may keep what it has read (prefix caching)
    for load in loads:
        seed = next(seeds)
        for served in dict.fromkeys(targets.values()):
            on_round(f"warm-up of {served.url}, clients: {load.clients}")
            run_load(served, load, seed)
    pids = [pid for served in targets.values() if (pid := listening_process(served.url)) is not None]
    found: list[SpeedRound] = []
    longest_s, looks = 0.0, list(check.LOOKS)
    for number in itertools.count():
        began = time.monotonic()
        if not looks or (number and began + longest_s > until):
            break
        for load in loads:
            on_round(f"round {number + 1}, clients: {load.clients}")
            found.append(_round(number, load, targets, run_load, pids, _prompts(targets, seeds)))
        longest_s = max(longest_s, time.monotonic() - began)
        if check.clean_rounds(found) >= looks[0]:
            del looks[0]
            if _is_decided(_evidence(found, config), limits):
                break
    return _evidence(found, config)


def _evidence(found: Sequence[SpeedRound], config: SpeedConfig) -> SpeedEvidence:
    return SpeedEvidence(
        found,
        config.metrics,
        config.slo_ttft_ms,
        config.slo_e2e_ms,
        config.requests,
        config.input_tokens,
        config.output_tokens,
    )


def _prompts(targets: Mapping[str, Served], seeds: Iterator[int]) -> Sequence[int]:
    """Seeds of the prompts of a round's runs: the base's and the candidate's are alike, the first two and the second,
    but for a server that is both, as it would see them twice."""
    first, second, third, fourth = (next(seeds) for _ in ORDER)
    return (first, second, third, fourth) if targets["base"] == targets["candidate"] else (first, first, third, third)


def _round(
    number: int,
    load: Load,
    targets: Mapping[str, Served],
    run_load: RunLoad,
    pids: Sequence[int],
    seeds: Sequence[int],
) -> SpeedRound:
    watch, runs = HostWatch(pids), []
    for target, seed in zip(ORDER, seeds, strict=True):
        watch.probe()
        runs.append(to_run(target, run_load(targets[target], load, seed), load))
    return SpeedRound(number, load.clients, runs, watch.read())


def _is_decided(evidence: SpeedEvidence, limits: Limits) -> bool:
    verdicts = {result.verdict for result in check.run(Evidence(speed=evidence), limits)}
    return Verdict.INCONCLUSIVE not in verdicts or bool(verdicts & {Verdict.FAIL, Verdict.ERROR})


def to_run(target: str, report: Mapping[str, Any], load: Load) -> SpeedRun:
    """A report of `vllm bench serve`, with its lists, as raw samples in milliseconds. `GateError` if it has none.

    A request has a gap less than tokens; chunks after these have no token, as the last one of llama.cpp's.
    """
    try:
        first = [1e3 * float(seconds) for seconds in report["ttfts"]]
        gaps = [request[: load.output_tokens - 1] for request in report["itls"]]
        between = [[1e3 * float(seconds) for seconds in request] for request in gaps]
        return SpeedRun(
            target=target,
            ttft_ms=first,
            itl_ms=[gap for request in between for gap in request],
            e2e_ms=[ttft + sum(request) for ttft, request in zip(first, between, strict=True)],
            duration_s=float(report["duration"]),
            output_tokens=load.prompts * load.output_tokens,  # of reports that are not `incomplete`
            failed=load.prompts - int(report["completed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GateError(f"a report of `vllm bench serve` lacks what is judged: {error!r}") from None


def listening_process(url: str) -> int | None:
    """Id of the process of this host that listens at `url`; None if that is elsewhere or cannot be seen."""
    parts = urlsplit(url)
    if parts.hostname not in _LOOPBACK:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        listening = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    pids = (one.pid for one in listening if one.status == psutil.CONN_LISTEN and one.laddr.port == port)
    return next((pid for pid in pids if pid is not None), None)

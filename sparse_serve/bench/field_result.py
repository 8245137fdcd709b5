"""What is found of servers that are under load in turns: each figure, and who took part.

Decoding speed in a turn is the number of clients divided by the time per output token, the first left out: the median
over requests of what lies between the first piece of text and the last, for all servers alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_serve.gate.evidence import HostReading
from sparse_serve.gate.speed import to_run
from sparse_serve.runtime.errors import BenchError
from sparse_serve.runtime.load import Load

TTFT_TOKENS = 2
"""Asked for where only the first one is waited for."""

_LEAST_MS = 1.0
"""From the first piece of an answer to its last; in less, a client has read them in one go."""


@dataclass(frozen=True)
class Entry:
    """A server that came up: seconds to that, bytes that it then held (None: not known), bytes and digest of the
    weights it serves, how its model runs (`compiled`, `eager`, or what instructions it was built for)."""

    name: str
    is_ours: bool
    start_s: float
    resident_bytes: int | None
    weight_bytes: int
    weights: str
    code: str


@dataclass(frozen=True)
class Turn:
    """One server under one load: milliseconds to the first token and per token after it, medians over requests.

    `idle_share` is what all other servers computed meanwhile, in cores.
    """

    name: str
    round: int
    load: Load
    ttft_ms: float
    tpot_ms: float
    idle_share: float

    @property
    def decodes(self) -> bool:
        """Whether it is long enough to tell how fast tokens follow each other."""
        return self.load.output_tokens > TTFT_TOKENS

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all clients together."""
        return self.load.clients * 1e3 / self.tpot_ms


@dataclass
class Result:
    """Who took part, who did not and why, every turn, and what each round's host was like.

    `failed` are those of ours that were in some rounds and then failed, and why; their turns of before count.
    """

    entries: list[Entry] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    hosts: list[HostReading] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def code_of(said: str) -> str:
    """How a model runs, from what its server printed and logged."""
    for word, code in (("enforce_eager=True", "eager"), ("enforce_eager=False", "compiled")):
        if word in said:
            return code
    built = next((line for line in said.splitlines() if line.startswith("built for ")), "unknown")
    present = [part.partition("=")[0] for part in built.removeprefix("built for ").split("|") if "= 1" in part]
    return " ".join(["built for", *(name.rpartition(":")[2].strip() for name in present)]) if present else built


def turn_of(name: str, number: int, load: Load, report: Mapping[str, Any], idle_share: float) -> Turn:
    """The figures of a report with its lists. Raises `BenchError` where tokens came too fast to tell them apart."""
    measured = to_run(name, report, load)
    gaps = load.output_tokens - 1
    spans = [e2e - ttft for e2e, ttft in zip(measured.e2e_ms, measured.ttft_ms, strict=True)]
    if load.output_tokens > TTFT_TOKENS and statistics.median(spans) < _LEAST_MS:
        raise BenchError(f"{name}: {load.output_tokens} tokens came all at once; ask for more --output-tokens")
    per_token = [span / gaps for span in spans]
    return Turn(
        name, number, load, statistics.median(measured.ttft_ms), statistics.median(per_token), round(idle_share, 4)
    )

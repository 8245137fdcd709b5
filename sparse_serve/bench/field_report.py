"""What was found of a field: each figure by server, and how many times better ours are than each peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maskgen.core.digest import digest_weights
from maskgen.core.files import read_json
from sparse_serve.bench.field import FieldRequest
from sparse_serve.bench.field_result import Result, Turn
from sparse_serve.bench.record import run_metadata
from sparse_serve.gate.host import contamination
from sparse_serve.runtime.machine import usable_cores, versions

DECODE, TTFT = "decode_tokens_per_s", "ttft_ms"
_VERSIONS_OF = ("gguf", "xllamacpp")


@dataclass(frozen=True)
class Row:
    """One figure: `DECODE` with so many clients, or `TTFT` of one client's prompt of so many tokens.

    `medians` are over rounds, by server; `ratios` say how many times better each of ours is than each peer, in each
    round that both were in. Below 1 it is worse.
    """

    metric: str
    clients: int
    input_tokens: int
    medians: Mapping[str, float]
    ratios: Mapping[str, Mapping[str, Sequence[float]]]

    @property
    def title(self) -> str:
        """For the head of a narrow column."""
        if self.metric == DECODE:
            return f"tokens/s\n{self.clients} client{'s' * (self.clients > 1)}"
        return f"ms first\nof {self.input_tokens}"


def compare(result: Result) -> list[Row]:
    """Decoding by number of clients, then time to the first token by length of a prompt."""
    decoding = [turn for turn in result.turns if turn.decodes]
    alone = [turn for turn in result.turns if turn.load.clients == 1]
    rows = [
        _row(DECODE, [turn for turn in decoding if turn.load.clients == clients], result)
        for clients in dict.fromkeys(turn.load.clients for turn in decoding)
    ]
    return rows + [
        _row(TTFT, [turn for turn in alone if turn.load.input_tokens == tokens], result)
        for tokens in sorted({turn.load.input_tokens for turn in alone})
    ]


def _row(metric: str, turns: Sequence[Turn], result: Result) -> Row:
    found: dict[str, dict[int, float]] = {}
    for turn in turns:
        found.setdefault(turn.name, {})[turn.round] = getattr(turn, metric)
    peers = [entry.name for entry in result.entries if not entry.is_ours and entry.name in found]
    ratios = {
        entry.name: {peer: _better(metric, found[entry.name], found[peer]) for peer in peers}
        for entry in result.entries
        if entry.is_ours and entry.name in found
    }
    medians = {name: statistics.median(values.values()) for name, values in found.items()}
    return Row(metric, turns[0].load.clients, turns[0].load.input_tokens, medians, ratios)


def _better(metric: str, mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    ratios = [mine[number] / theirs[number] for number in sorted(mine.keys() & theirs.keys())]
    return ratios if metric == DECODE else [1 / ratio for ratio in ratios]


def record(request: FieldRequest, result: Result) -> dict[str, Any]:
    """What a result file holds: settings, versions, machine, who took part, every figure of every turn."""
    names = ("clients", "requests", "input_tokens", "output_tokens", "rounds", "vllm_flags")
    common = run_metadata()
    checkpoints = {f"sparse {number}": path for number, path in enumerate(request.sparse, 1)}
    return {
        **common,
        "versions": {**common["versions"], **versions(*_VERSIONS_OF)},
        "inputs": {name: digest_weights(path) for name, path in {"dense": request.dense, **checkpoints}.items()},
        "model": request.dense.resolve().name,
        "config": read_json(request.dense / "config.json"),
        "threads": request.threads or len(usable_cores()),
        **{name: getattr(request, name) for name in names},
        "servers": [asdict(entry) for entry in result.entries],
        "refused": result.refused,
        "failed": result.failed,
        "results": [asdict(row) for row in compare(result)],
        "disturbed": contamination(result.hosts),
        "hosts": [asdict(host) for host in result.hosts],
        "turns": [asdict(turn) for turn in result.turns],
    }

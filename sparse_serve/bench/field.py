"""A sparse model served beside what a user would pick instead: stock vLLM quantised or not, and llama.cpp.

    result = run(FieldRequest(dense="DENSE", sparse=("SPARSE",), peers=("bf16", "w8a8")))
    compare(result)                     # `bench.field_report`

All servers (`bench.peers`) are started once, one after the other, and stay; in a round each is put under every load in
its turn while the others have nothing to do, and the turns begin with another one in every round. Ratios are taken
within a round. How much the idle servers computed meanwhile, and whether the host was quiet, is in the record.

The load is vLLM's `vllm bench serve`. A load is so many clients with the first of `input_tokens`; with the others, and
where no load has a single client, one client asks for two tokens, for the time to the first. Decoding speed is the
number of clients divided by the time per output token, the first left out: the median over requests of what lies
between the first piece of text and the last, for all servers alike, as llama.cpp says how many tokens a piece has in
another way than vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
from pydantic import Field

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import digest_file, digest_weights
from maskgen.core.errors import SparseError
from maskgen.core.files import read_json
from sparse_serve.bench import peers, serve
from sparse_serve.bench.field_result import TTFT_TOKENS, Entry, Result, Turn, code_of, turn_of
from sparse_serve.bench.peers import Conditions, Contender
from sparse_serve.bench.resident import processor_s, resident_bytes
from sparse_serve.gate.footprint import weight_bytes
from sparse_serve.gate.host import HostWatch
from sparse_serve.runtime import environment, machine, processes
from sparse_serve.runtime.errors import BenchError, GateError, SettingsError
from sparse_serve.runtime.load import (
    Load,
    RunLoad,
    Server,
    bench_serve,
    load_generator,
    reason_of,
    started,
    temporary,
)
from sparse_serve.runtime.request import Request

SLACK_TOKENS = 64
"""Room beside prompt and answer, as a prompt has a few tokens more or less than asked for."""

_START_BYTES = 1 << 31
"""What a start takes beside twice the weights, roughly; below it, servers would push each other out of memory."""

Positive = serve.Positive


class FieldRequest(Request):
    """Whom to serve, under which loads. Raises `SettingsError` for a value out of range.

    `sparse` are checkpoints of the model `dense`; `peers` are names of `peers.PEERS`. `threads` is for every server
    alike (None: all cores). What peers are made into is kept in `keep_peers`, or removed. `vllm_flags` go to every
    server with vLLM in it. With `int8_activations` ours with int8 or int4 values are served a second time, with
    activations rounded; with `int8_head`, too, those have the output layer in int8.
    """

    dense: Path
    sparse: tuple[Path, ...] = Field(min_length=1)
    peers: tuple[str, ...] = ("bf16", "w8a8", "w4a16")
    clients: tuple[Positive, ...] = (1, 4, 8)
    requests: Positive = 4
    input_tokens: tuple[Positive, ...] = Field(default=(128, 1024), min_length=1)
    output_tokens: Annotated[int, Field(ge=2)] = 128
    rounds: Positive = 3
    threads: Positive | None = None
    keep_peers: Path | None = None
    vllm_flags: tuple[str, ...] = ()
    int8_activations: bool = False
    int8_head: bool = False

    @property
    def context_tokens(self) -> int:
        """What a server has to have room for in a request."""
        return max(self.input_tokens) + self.output_tokens + SLACK_TOKENS

    def loads(self) -> list[Load]:
        """Every load of a turn, in order."""
        first, *others = self.input_tokens
        loads = [Load(clients, self.requests, first, self.output_tokens) for clients in self.clients]
        alone = others if 1 in self.clients else [first, *others]
        return loads + [Load(1, self.requests, tokens, TTFT_TOKENS) for tokens in alone]


def run(
    request: FieldRequest,
    on_progress: Callable[[str], None] = lambda text: None,
    after_round: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Start every server and put them under load in turns; takes minutes.

    A peer that cannot be had, does not start or does not answer is left out with its reason, and the rest go on; so it
    is with one of ours that fails in its turn, but what it did in whole rounds before counts. The run ends when none of
    ours is left. Raises `BenchError` when one of ours does not start, or none was in a whole round, and `SettingsError`
    for models that are not forms of one, or do not fit.
    """
    check(request)
    result = Result()
    try:
        with environment.restored(), temporary("sparse-serve-bench-") as work_dir, ExitStack() as stack:
            processes.lead()  # all servers, and the generator of load, end with this process however it ends
            runner = _Runner(request, result, work_dir, stack, on_progress)
            runner.start_all()
            with load_generator(work_dir) as generator:
                for number in range(request.rounds):
                    if runner.has_ours:
                        runner.round(number, generator)
                        after_round(result)
            if runner.failures:  # past `temporary`, so that their logs stay
                raise runner.failures[0]
    except (BenchError, GateError):
        if not {turn.name for turn in result.turns} & {entry.name for entry in result.entries if entry.is_ours}:
            raise
    return result


def check(request: FieldRequest) -> None:
    """Raise `SettingsError` for names and lengths that cannot be, and what `serve.check` does for models."""
    if torch.cuda.is_available():
        raise SettingsError("--peers: servers beside each other on one GPU would not get its memory; only on CPUs")
    unknown = [name for name in request.peers if name not in peers.PEERS]
    if unknown:
        raise SettingsError(f"--peers {unknown[0]}: no such peer; known are {', '.join(peers.PEERS)}")
    if request.int8_head and not request.int8_activations:
        raise SettingsError("--int8-head: of those that --int8-activations serves; give that, too")
    for path in request.sparse:
        serve.check(request.dense, path)
    most = read_json(request.dense / "config.json").get("max_position_embeddings")
    if most is not None and request.context_tokens > most:
        asked = f"{max(request.input_tokens)} with --output-tokens {request.output_tokens} and {SLACK_TOKENS} to spare"
        raise SettingsError(f"--input-tokens {asked} is more than the {most} tokens of {request.dense}; take fewer")


class _Runner:
    """The servers that are up, and what was found of them so far."""

    def __init__(
        self,
        request: FieldRequest,
        result: Result,
        work_dir: Path,
        stack: ExitStack,
        on_progress: Callable[[str], None],
    ) -> None:
        self.result = result
        self.failures: list[SparseError] = []  # of ours
        self._request, self._work_dir, self._stack, self._tell = request, work_dir, stack, on_progress
        self._up: dict[str, Server] = {}
        self._stops: dict[str, ExitStack] = {}  # of every server that was started

    @property
    def has_ours(self) -> bool:
        """Whether one of ours is up, with which others can be compared."""
        return any(map(self._is_ours, self._up))

    def start_all(self) -> None:
        """Ours first; each peer is made when it is its turn."""
        request = self._request
        folder = request.keep_peers or Path(self._stack.enter_context(TemporaryDirectory(prefix="sparse-serve-peers-")))
        folder.mkdir(parents=True, exist_ok=True)
        threads = request.threads or len(machine.usable_cores())
        slots = max(request.clients)
        room = (slots, request.context_tokens)
        conditions = Conditions(threads, *room, request.vllm_flags, folder, request.int8_activations, request.int8_head)
        for contender in peers.ours(request.sparse, conditions):
            self._start(contender)
        layers = SparseCheckpoint.open(request.sparse[0], verify_bits=False).config.targets
        for name in dict.fromkeys(request.peers):
            try:
                self._tell(f"making {name}")
                self._start(peers.peer(name, request.dense, layers, conditions))
            except SparseError as error:
                self._refuse(name, error)

    def round(self, number: int, generator: RunLoad) -> None:
        """Every server that is up under every load, the first another one than in the round before."""
        names, watch = list(self._up), HostWatch()
        for name in names[number % len(names) :] + names[: number % len(names)]:
            watch.probe()
            try:
                turns = [self._turn(name, number, at, load, generator) for at, load in enumerate(self._request.loads())]
            except (BenchError, GateError) as error:
                self._drop(name, number, error)
                continue
            self.result.turns += turns
            shown = ", ".join(f"{turn.decode_tokens_per_s:.1f}" for turn in turns if turn.decodes)
            self._tell(f"round {number + 1}: {name}, tokens/s decoding: {shown}")
        self.result.hosts.append(watch.read())

    def _drop(self, name: str, number: int, error: BenchError | GateError) -> None:
        """Go on without a server that has failed in a round."""
        if self._is_ours(name):
            self.failures.append(error)
            self.result.failed[name] = f"round {number + 1}: {reason_of(error)}"
            self._tell(f"{name} failed in round {number + 1}: {error}")
        else:
            self._refuse(name, error)
            self.result.turns = [turn for turn in self.result.turns if turn.name != name]
        del self._up[name]
        self._stops[name].close()  # what it still computes would disturb the others

    def _start(self, contender: Contender) -> None:
        name, model = contender.name, contender.model
        size, digest = _weights(model)
        free = machine.available_bytes()
        if 2 * size + _START_BYTES > free:
            raise BenchError(
                f"{free / 1e9:.1f} GB of memory are free beside the servers that run, too few for {name}; serve fewer"
            )
        self._tell(f"starting {name}")
        file = f"server-{len(self._stops)}"
        stop = self._stops[name] = self._stack.enter_context(ExitStack())
        server = self._up[name] = stop.enter_context(
            started(name, contender.command, self._work_dir, file, contender.environ, contender.address)
        )
        held, code = resident_bytes(server.pid, model), code_of(server.said())
        entry = Entry(name, contender.is_ours, server.start_s, held, size, digest, code)
        self.result.entries.append(entry)
        self._tell(f"{name} is up after {server.start_s:.0f} s, {entry.code}")

    def _turn(self, name: str, number: int, at: int, load: Load, generator: RunLoad) -> Turn:
        idle = [server.pid for other, server in self._up.items() if other != name]
        began_s, before_s = time.monotonic(), processor_s(idle)
        seed = number * len(self._request.loads()) + at  # of a round's load: the same prompts for all
        server = self._up[name]
        model = peers.served_name(server.url)
        report = bench_serve(server.url, self._request.dense, load, seed, self._work_dir, model, generator)
        share = (processor_s(idle) - before_s) / (time.monotonic() - began_s)
        return turn_of(name, number, load, report, share)

    def _is_ours(self, name: str) -> bool:
        return any(entry.is_ours for entry in self.result.entries if entry.name == name)

    def _refuse(self, name: str, error: SparseError) -> None:
        self.result.refused[name] = reason_of(error)
        self._tell(f"without {name}: {error}")


def _weights(model: Path) -> tuple[int, str]:
    """Bytes and digest of a directory's safetensors files, or of a GGUF file."""
    if model.is_file():
        return model.stat().st_size, digest_file(model)
    return weight_bytes(model), digest_weights(model)

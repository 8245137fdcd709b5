"""What a token costs the server's process through each API, and how long the first takes, for docs/production.md.

    python -m tests.bench.api_cost MODEL --rounds 5 --save

Ways to one engine, in turn, as many times as there are rounds: `in-process` reads vLLM's `AsyncLLM` in the process that
has it; `grpc`, `vllm-grpc` (`--smg`) and `http` are streams of one `sparse-serve serve`, with a connection each,
`grpc-shared` those of one connection. CPU time is that of the process with the API, all of its threads, without the
engine's own process and without the client, over the tokens made. Time to the first token is the client's. With
`--step` a round starts when a line comes on standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from maskgen.core.digest import digest_weights
from sparse_serve.runtime.load import serve_command, started
from sparse_serve.server.handshake import event_loop
from tests.bench import record

WAYS = ("in-process", "grpc", "grpc-shared", "vllm-grpc", "http")
FLAGS = ("--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs=64")
PROMPT = list(range(5, 37))
"""Token ids that a vocabulary of any size has."""

Stream = Callable[[int], AsyncIterator[int]]
"""From the number of tokens that are wanted to how many came, piece by piece."""


@dataclass(frozen=True)
class Turn:
    """One way under one load: tokens that came, in how many pieces; seconds of CPU and by the clock; the median time to
    a first token, and between two pieces, in milliseconds."""

    tokens: int
    pieces: int
    cpu_s: float
    wall_s: float
    first_ms: float
    between_ms: float

    @property
    def us_per_token(self) -> float:
        return self.cpu_s / self.tokens * 1e6

    def line(self) -> str:
        """For a person."""
        return (
            f"{self.us_per_token:.1f} us a token, {self.tokens / self.wall_s:.0f} tokens/s, "
            f"{self.tokens / self.pieces:.2f} a piece, first {self.first_ms:.1f} ms, between {self.between_ms:.1f} ms"
        )


async def load(streams: list[Stream], tokens: int, seconds: float, cpu_s: Callable[[], float]) -> Turn:
    """Every stream again and again, until the time is over; requests that run then are finished and counted."""
    firsts, gaps, total, pieces = [], [], 0, 0
    began_s, before_s = time.monotonic(), cpu_s()

    async def client(stream: Stream) -> None:
        nonlocal total, pieces
        while time.monotonic() - began_s < seconds:
            asked_s = last_s = time.monotonic()
            first = True
            async for count in stream(tokens):
                now_s = time.monotonic()
                (firsts if first else gaps).append((now_s - last_s) * 1e3)
                total, pieces, last_s, first = total + count, pieces + 1, now_s, False
            assert not first and last_s > asked_s

    await asyncio.gather(*map(client, streams))
    return Turn(
        total,
        pieces,
        cpu_s() - before_s,
        time.monotonic() - began_s,
        statistics.median(firsts),
        statistics.median(gaps),
    )


@contextlib.asynccontextmanager
async def channels(address: str, count: int) -> AsyncIterator[list[Any]]:
    """So many connections to a gRPC server."""
    import grpc

    async with contextlib.AsyncExitStack() as opened:
        options = [("grpc.use_local_subchannel_pool", 1)]
        yield [await opened.enter_async_context(grpc.aio.insecure_channel(address, options)) for _ in range(count)]


def own_stream(channel: Any) -> Stream:
    """A stream of `sparse_serve.v1`."""
    from sparse_serve.api.pb.v1 import generation_pb2 as pb
    from sparse_serve.api.pb.v1 import generation_pb2_grpc

    stub = generation_pb2_grpc.GenerationServiceStub(channel)

    async def stream(tokens: int) -> AsyncIterator[int]:
        sampling = pb.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        request = pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
        async for piece in stub.GenerateStream(request):
            yield len(piece.token_ids)

    return stream


def smg_stream(channel: Any) -> Stream:
    """A stream of `vllm.grpc.engine.VllmEngine`."""
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc

    stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)

    async def stream(tokens: int) -> AsyncIterator[int]:
        sampling = pb.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        tokenized = pb.TokenizedInput(input_ids=PROMPT)
        async for piece in stub.Generate(
            pb.GenerateRequest(tokenized=tokenized, sampling_params=sampling, stream=True)
        ):
            if piece.HasField("chunk"):
                yield len(piece.chunk.token_ids)

    return stream


@contextlib.asynccontextmanager
async def grpc_streams(way: str, address: str, count: int) -> AsyncIterator[list[Stream]]:
    """Streams of a way over gRPC."""
    made = smg_stream if way == "vllm-grpc" else own_stream
    async with channels(address, 1 if way == "grpc-shared" else count) as opened:
        yield [made(opened[number % len(opened)]) for number in range(count)]


@contextlib.asynccontextmanager
async def http_streams(url: str, count: int) -> AsyncIterator[list[Stream]]:
    """Streams of `/v1/completions`, a connection each."""
    import aiohttp

    async with contextlib.AsyncExitStack() as open_sessions:
        streams = []
        for _ in range(count):
            session = await open_sessions.enter_async_context(aiohttp.ClientSession(url))

            async def stream(tokens: int, session: Any = session) -> AsyncIterator[int]:
                body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
                body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
                had = 0
                async with session.post("/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    async for line in answer.content:
                        if found := re.search(rb'"completion_tokens":(\d+)', line):
                            if int(found[1]) > had:
                                yield int(found[1]) - had
                            had = int(found[1])

            streams.append(stream)
        yield streams


@contextlib.asynccontextmanager
async def engine_streams(client: Any, count: int) -> AsyncIterator[list[Stream]]:
    """Requests to an `AsyncLLM` of this process."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    numbers = iter(range(1 << 30))

    async def stream(tokens: int) -> AsyncIterator[int]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        name = f"bench-{time.monotonic_ns()}-{next(numbers)}"
        async for output in client.generate({"prompt_token_ids": PROMPT}, params, name):
            yield len(output.outputs[0].token_ids)

    yield [stream] * count


async def in_process(model: str) -> None:
    """The process of the way of this name: a load for each line of standard input, a `Turn` for each on standard
    output."""
    from sparse_serve.engine.vllm_engine import VllmEngine

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine = VllmEngine(model, list(FLAGS))
    await engine.start()
    answers.write("{}\n")
    answers.flush()
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            async with engine_streams(engine.client, asked["streams"]) as streams:
                turn = await load(streams, asked["tokens"], asked["seconds"], time.process_time)
            answers.write(json.dumps(asdict(turn)) + "\n")
            answers.flush()
    finally:
        await engine.stop(5.0)


@contextlib.contextmanager
def engine_process(model: Path, log: Path) -> Iterator[Callable[[int, int, float], Awaitable[Turn]]]:
    """A process of `in_process`, and how to have it make a turn."""
    command = [sys.executable, "-m", "tests.bench.api_cost", str(model), "--in-process"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdin is not None and process.stdout is not None
    tell, hear = process.stdin, process.stdout

    async def turn(streams: int, tokens: int, seconds: float) -> Turn:
        tell.write(json.dumps({"streams": streams, "tokens": tokens, "seconds": seconds}) + "\n")
        tell.flush()
        return Turn(**json.loads(await asyncio.to_thread(hear.readline)))

    try:
        if not hear.readline():
            raise SystemExit(f"the engine did not start: {log.read_text('utf-8', 'replace')[-2000:]}")
        yield turn
    finally:
        tell.close()
        process.wait()
        hear.close()


async def measure(args: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Start both processes, and give every way its turns, round by round."""
    rows = []
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        command = serve_command(args.model, [*FLAGS, "--smg", *args.serve])
        server = running.enter_context(started("the server", command, folder))
        inside = running.enter_context(engine_process(args.model, folder / "engine.log"))
        found = re.search(r"^ +gRPC +(\S+)", server.out.read_text("utf-8"), re.MULTILINE)
        assert found is not None
        process = psutil.Process(server.pid)

        def cpu_s() -> float:
            times = process.cpu_times()
            return times.user + times.system

        async def turn(way: str, streams: int, tokens: int, seconds: float) -> Turn:
            if way == "in-process":
                return await inside(streams, tokens, seconds)
            opened = http_streams(server.url, streams) if way == "http" else grpc_streams(way, found[1], streams)
            async with opened as ready:
                return await load(ready, tokens, seconds, cpu_s)

        for number in range(-1, args.rounds):  # the first is a warm-up
            if args.step and number >= 0:
                await asyncio.to_thread(sys.stdin.readline)
            for streams, tokens in ((64, 256), (8, 32)):
                for way in args.ways:
                    made = await turn(way, streams, tokens, 2.0 if number < 0 else args.seconds)
                    if number >= 0:
                        rows.append({"round": number, "way": way, "streams": streams, **asdict(made)})
                        say(f"{number} {way} {streams}: {made.line()}")
            say(f"end of round {number}" if number >= 0 else "warm")
    return rows


def main() -> None:
    """Measure, print a line for each turn, and write all of it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that `sparse-serve serve` takes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--serve", action="append", default=[], metavar="=FLAG", help="one more flag of the server")
    parser.add_argument("--step", action="store_true", help="wait for a line before each round")
    parser.add_argument("--save", action="store_true", help="keep the rows under tests/bench/results")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        with event_loop(tls=False) as runner:
            runner.run(in_process(str(args.model)))
        return
    with event_loop(tls=False) as runner:
        rows = runner.run(measure(args, lambda line: print(line, flush=True)))  # noqa: T201
    if args.save:
        found = {"model": args.model.name, "model_digest": digest_weights(args.model), "rows": rows}
        print(record.save("api-cost", args.model.name, found))  # noqa: T201


if __name__ == "__main__":
    main()

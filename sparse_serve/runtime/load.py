"""Processes for benchmarks and the gate: a server, and vLLM's load generator against it.

Both write into files. When one fails, the error has the end of its log. The server is asked to end whatever happens
here, and is made to if it does not; should this process be killed, it ends by itself (`processes`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgen.core.errors import SparseError
from maskgen.core.files import read_json
from sparse_serve.runtime import processes
from sparse_serve.runtime.errors import BenchError

logger = logging.getLogger(__name__)

_START_S = 3600
"""The longest that a start may take: a model of 70 billion weights is read and compiled in less."""

_STOP_S = 60.0
_READY_S = 30
"""How long the load generator asks a server that does not answer: it was up before, and is dead by then."""

_TAIL_LINES = 20
_PATHS = ("model_id", "tokenizer_id")
_ADDRESS = re.compile(r"^ +HTTP +(http://\S+).*\n", re.MULTILINE)


@dataclass(frozen=True)
class Load:
    """So many clients, each with so many requests, one after the other; `input_tokens` in, `output_tokens` out."""

    clients: int
    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def prompts(self) -> int:
        """Requests of all clients."""
        return self.clients * self.requests


@contextmanager
def temporary(prefix: str) -> Iterator[Path]:
    """A temporary directory that stays when a child failed, as its log is there."""
    path, is_wanted = Path(tempfile.mkdtemp(prefix=prefix)), False
    try:
        yield path
    except BenchError:
        is_wanted = True
        raise
    finally:
        if not is_wanted:
            shutil.rmtree(path)


@dataclass(frozen=True)
class Server:
    """A server that has just come up: its address, its process, how long that took, and the files of what it says."""

    url: str
    pid: int
    start_s: float
    out: Path
    log: Path

    def said(self) -> str:
        """All that it has printed and logged so far."""
        return "".join(file.read_text("utf-8", "replace") for file in (self.out, self.log))


@contextmanager
def serving(model_dir: Path, flags: Sequence[str], work_dir: Path) -> Iterator[str]:
    """The address of a `sparse-serve serve` of `model_dir`; it is gone afterwards. Raises `BenchError` with its log."""
    with started(f"the server of {model_dir}", serve_command(model_dir, flags), work_dir) as server:
        yield server.url


def serve_command(model_dir: Path, flags: Sequence[str]) -> list[str]:
    """Of a `sparse-serve serve` that logs all it has to say, at ports of its own choice."""
    command = [sys.executable, "-m", "sparse_serve.cli.main", "serve", str(model_dir), "--verbose", "--no-convert"]
    return [*command, "--http-port=0", "--grpc-port=0", *flags]


@contextmanager
def started(
    what: str,
    command: Sequence[str],
    work_dir: Path,
    name: str = "server",
    environ: Mapping[str, str] | None = None,
    address: Callable[[str], str | None] | None = None,
) -> Iterator[Server]:
    """Run the server `command` with `environ` on top of this process's environment; it is gone afterwards.

    It is up when `address` of what it has printed is not None, by default the line that ours prints. `what` and `name`
    name it in errors and its files. Raises `BenchError` with its log.
    """
    find = address or http_address
    out, log = work_dir / f"{name}.out", work_dir / f"{name}.log"
    began_s = time.monotonic()
    with out.open("wb") as out_file, log.open("wb") as log_file:
        # a session of its own: a Ctrl-C reaches us, and we tell the server
        server = subprocess.Popen(
            command, stdout=out_file, stderr=log_file, start_new_session=True, env={**os.environ, **(environ or {})}
        )
    try:
        while not (url := find(out.read_text("utf-8", "replace"))):
            if server.poll() is not None:
                raise BenchError(f"{what} ended with {server.returncode}; {_end_of(log)}")
            if time.monotonic() - began_s > _START_S:
                raise BenchError(f"{what} was not up after {_START_S} s; {_end_of(log)}")
            time.sleep(0.1)
        yield Server(url, server.pid, time.monotonic() - began_s, out, log)
    finally:
        _stop(server)


def http_address(said: str) -> str | None:
    """The address in what `sparse-serve serve` has printed so far (`cli.serve.ready_block`); None before."""
    found = _ADDRESS.search(said)
    return found[1] if found else None


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        logger.warning("the server did not end within %g s and is killed", _STOP_S)
    finally:
        if server.poll() is None:  # it hangs, or a second Ctrl-C says not to wait
            started = processes.descendants(server.pid)
            server.kill()
            processes.kill(started)
            server.wait()


RunLoad = Callable[[Sequence[str], Path], int]
"""Runs `vllm bench serve` with these flags and that log; returns its exit status."""


def run_once(flags: Sequence[str], log: Path) -> int:
    """In a process that loads vLLM for this run alone."""
    command = [sys.executable, "-m", "sparse_serve.cli.vllm", "bench", "serve", *flags]
    with log.open("wb") as log_file:
        return subprocess.run(command, stdout=log_file, stderr=subprocess.STDOUT, check=False).returncode


@contextmanager
def load_generator(work_dir: Path) -> Iterator[RunLoad]:
    """Runs in processes that are forked from one which has loaded vLLM (`cli.load_generator`): loading it takes many
    times as long as a short run. Its own log is in `work_dir`.
    """
    command = [sys.executable, "-m", "sparse_serve.cli.load_generator"]
    own_log = work_dir / "load-generator.log"
    with own_log.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_file, text=True, start_new_session=True
        )
    assert process.stdin is not None and process.stdout is not None

    def run(flags: Sequence[str], log: Path) -> int:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"flags": list(flags), "log": str(log)}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and so has its output
        if not (answer := process.stdout.readline()):
            raise BenchError(f"vLLM's load generator ended with {process.wait()}; {_end_of(own_log)}")
        return int(answer)

    try:
        yield run
    finally:
        started = processes.descendants(process.pid)
        process.kill()
        processes.kill(started)
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # of what it was not able to read any more
            process.stdin.close()


def bench_serve(
    url: str,
    tokenizer: str | Path,
    load: Load,
    seed: int,
    work_dir: Path,
    model: str | None = None,
    run: RunLoad = run_once,
) -> dict[str, Any]:
    """Run `vllm bench serve` against the server at `url`; returns its report with the lists of single requests.

    `model` is the name to ask for; None: the first that the server names. Raises `BenchError` with the end of its log
    if it fails, or if a request failed or stopped early.
    """
    report, log = work_dir / "report.json", work_dir / "load.log"
    report.unlink(missing_ok=True)
    values = {
        "base-url": url,
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": load.input_tokens,
        "random-output-len": load.output_tokens,
        "num-prompts": load.prompts,
        "max-concurrency": load.clients,
        "num-warmups": load.clients,
        "ready-check-timeout-sec": _READY_S,
        "temperature": 0,
        "seed": seed,
        "result-dir": work_dir,
        "result-filename": report.name,
    }
    if model is not None:
        values["model"] = model
    flags = ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
    code = run([*flags, *(f"--{name}={value}" for name, value in values.items())], log)
    if code or not report.is_file():
        raise BenchError(f"vllm bench serve on {url} ended with {code}; {_end_of(log)}")
    result = read_json(report)
    problem = incomplete(result, load)
    if problem:
        raise BenchError(f"vllm bench serve on {url}: {problem}; {_end_of(log)}")
    return result


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of `vllm bench serve` less single requests and paths."""
    return {name: value for name, value in report.items() if not (isinstance(value, list) or name in _PATHS)}


def incomplete(report: Mapping[str, Any], load: Load) -> str | None:
    """Why a report of `vllm bench serve` is not one of `load`, if it is not: requests that failed or stopped early.

    Where a server counts tokens in a chunk that has text, too, as llama.cpp's does, vLLM does not see its count, and
    makes tokens of the text anew, which may be fewer. A request with as many chunks as tokens is whole then.
    """
    completed, tokens = report.get("completed"), report.get("total_output_tokens")
    chunks = [1 + len(gaps) for gaps in report.get("itls", [])]
    is_whole = len(chunks) == load.prompts and min(chunks) >= load.output_tokens
    if completed == load.prompts and (is_whole or tokens == load.prompts * load.output_tokens):
        return None
    reason = next(filter(None, report.get("errors", [])), "no reason was given").strip().splitlines()[-1]
    return (
        f"{completed} of {load.prompts} requests were answered, with {tokens} tokens in all; expected "
        f"{load.output_tokens} from each ({reason})"
    )


def reason_of(error: SparseError) -> str:
    """An error in one line. Of one that has the end of a log: what went wrong, and the log's last line."""
    first, *others = str(error).splitlines()
    return f"{first.partition('; the end of ')[0]}: {others[-1].strip()}" if others else first


def _end_of(log: Path) -> str:
    """The last lines of a log, indented, and where the others are."""
    lines = log.read_text("utf-8", "replace").rstrip().splitlines()[-_TAIL_LINES:]
    return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines)])

"""Real vLLM without paying for its imports again: children forked from a process that has imported it.

Importing vLLM takes 10 s of a core and starting a tiny model one. So each pytest process has a nursery: a process that
was forked from it when the tests were collected and none had run, and that imports vLLM but never starts anything.
Tests of the plugin and of numbers run each in a child of the nursery, so that engines leave nothing to the next test:
no threads, environment, patched torch or memory. Of the pytest process itself, children would inherit what does not
survive a fork, if any test before them had used it: torch's threads, whose pool hangs in a child, or gRPC.

What is about processes (servers, their endings, vLLM's own command line) starts them as users do, in the modules of
`AS_USERS_DO`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch._dynamo
from _pytest.runner import runtestprotocol

from sparse_serve.runtime import processes

AS_USERS_DO = {
    "test_server",
    "test_services",
    "test_smg",
    "test_embeddings",
    "test_endings",
    "test_starts",
    "test_foreign_server",
    "test_stock",
    "test_compiled",
    "test_bench_serve",
    "test_demo",
    "test_docs",
}
"""Modules whose tests are not children of the pytest process: they start processes anew, or have a `Nursery`."""

ARCHITECTURES = [
    f"{name}ForCausalLM"
    for name in (
        *("Cohere", "DeepseekV2", "Falcon", "GPTJ", "GPTNeoX", "Gemma3", "Glm4", "Llama", "Mistral", "OPT", "Phi3"),
        *("Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe"),
    )
]
"""Those that tests serve."""


@functools.cache
def prepare() -> None:
    """Import vLLM, and what it imports late, into this process."""
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.async_llm
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.models import registry

    import sparse_serve.engine.vllm_engine
    import sparse_serve.plugin.config  # noqa: F401

    torch._dynamo.config.disable = True  # as TORCHDYNAMO_DISABLE says, which was read too early
    for architecture in ARCHITECTURES:
        registry.ModelRegistry.models[architecture].load_model_cls()
    for method in quantization.QUANTIZATION_METHODS:
        with contextlib.suppress(ImportError):
            quantization.get_quantization_config(method)
    # vLLM asks a process of its own, which imports everything again, what each class of models can do.
    registry._run_in_subprocess = lambda ask: ask()
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()  # vLLM collects garbage ten times in the life of an engine; children need not look through all this


class Nursery:
    """The process, seen from the pytest process that forks it now. It ends when that one does."""

    def __init__(self, items: Sequence[pytest.Item]) -> None:
        ours, theirs = socket.socketpair()
        self._indices = {item: index for index, item in enumerate(items)}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                warnings.simplefilter("ignore")  # they are not ours to fix
                ours.close()
                _serve(theirs.makefile("rw"), items)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()
        self._stream = ours.makefile("rw")

    def run_item(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Run one test in a child, and report what it reports."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "reports"
            try:
                status = self._run({"item": self._indices[item], "answer": str(answer)})
                reports = _reports(item, answer) if status == 0 else [_failed(item, _ending(status))]
            except pytest.fail.Exception as time_limit:
                reports = [_failed(item, str(time_limit))]
        # What the test before this one left set up, because this one shares it, ends where the next one does not.
        item.session._setupstate.teardown_exact(nextitem)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`sparse-serve WORDS` in a child; the exit status and what it wrote."""
        argv = [str(word) for word in words]
        with _outputs() as (out, err):
            status = self._run({"argv": argv, "outputs": [str(out), str(err)]})
            return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())

    def _run(self, request: dict[str, Any]) -> int:
        """Exit status of a child, in the environment of this process."""
        print(json.dumps({**request, "environment": dict(os.environ)}), file=self._stream, flush=True)
        pid = None
        try:
            pid = int(self._stream.readline())
            return int(self._stream.readline())
        except BaseException:  # the time limit of a test, which is raised here, or Ctrl-C
            _end(int(self._stream.readline()) if pid is None else pid)
            self._stream.readline()
            raise


def _serve(stream: TextIO, items: Sequence[pytest.Item]) -> None:
    """The nursery's loop: one request a line; to each, a child's process id, and its exit status when it has ended."""
    while request := stream.readline():
        asked = json.loads(request)
        _take_environment(asked["environment"])
        prepare()
        if "argv" in asked:
            out, err = map(Path, asked["outputs"])
            pid = start(partial(_main, asked["argv"], out, err))
        else:
            pid = start(partial(_test, items[asked["item"]], Path(asked["answer"])))
        print(pid, file=stream, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=stream, flush=True)


def _take_environment(wanted: dict[str, str]) -> None:
    """What stays as it is is not touched: setproctitle looks for the first variable where the process began."""
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _test(item: pytest.Item, answer: Path) -> int:
    gc.freeze = gc.unfreeze = lambda: None
    reports = runtestprotocol(item, log=False, nextitem=None)
    kept = [item.config.hook.pytest_report_to_serializable(config=item.config, report=it) for it in reports]
    answer.write_bytes(pickle.dumps(kept))
    return 0


def _reports(item: pytest.Item, answer: Path) -> list[pytest.TestReport]:
    hook = item.config.hook
    return [
        hook.pytest_report_from_serializable(config=item.config, data=data)
        for data in pickle.loads(answer.read_bytes())
    ]


def _failed(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", f"{item.nodeid}: {why}", "call")


def _ending(status: int) -> str:
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"the process of the test ended with {how}"


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """`sparse-serve WORDS` in a child of this process, itself a child of the nursery."""
    argv = [str(word) for word in words]
    with _outputs() as (out, err):
        status = fork(partial(_main, argv, out, err))
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


@contextlib.contextmanager
def _outputs() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "out", Path(folder) / "err"


def _main(argv: list[str], out: Path, err: Path) -> int:
    from sparse_serve.cli.main import main

    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    logging.getLogger().handlers.clear()
    for handler in logging.getLogger("vllm").handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(sys.stderr)
    return main(argv)


def fork(work: Callable[[], int]) -> int:
    """Exit status of a child that does `work`; negative, the signal that ended it."""
    pid = start(work)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:  # Ctrl-C, or the time limit of a test that is no child itself
        _end(pid)
        os.waitpid(pid, 0)
        raise


def _end(pid: int) -> None:
    """Kill a process and all below it."""
    below = processes.descendants(pid)
    os.kill(pid, signal.SIGKILL)
    processes.kill(below)


def start(work: Callable[[], int]) -> int:
    """Process id of a new child that does `work`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = work()
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid

"""Real vLLM without paying for its imports again: children forked from a process that has imported it.

Importing vLLM takes 10 s of a core and starting a tiny model one. Tests of the plugin and of numbers therefore run each
in a child of the pytest process, which itself imports but never starts anything, so that engines leave nothing to the
next test: no threads, environment, patched torch or memory. What is about processes (servers, their endings, vLLM's own
command line) starts them as users do, in the modules of `AS_USERS_DO`.
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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch._dynamo
from _pytest.runner import runtestprotocol

from sparse_serve.runtime import processes

AS_USERS_DO = {
    "test_server",
    "test_endings",
    "test_starts",
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


def run_item(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Run one test in a child, and report what it reports."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "reports"

        def child() -> int:
            gc.freeze = gc.unfreeze = lambda: None
            reports = runtestprotocol(item, log=False, nextitem=None)
            kept = [item.config.hook.pytest_report_to_serializable(config=item.config, report=it) for it in reports]
            answer.write_bytes(pickle.dumps(kept))
            return 0

        try:
            status = fork(child)
            reports = _reports(item, answer) if status == 0 else [_failed(item, _ending(status))]
        except pytest.fail.Exception as time_limit:
            reports = [_failed(item, str(time_limit))]
    # What the test before this one left set up, because this one shares it, ends where the next one does not.
    item.session._setupstate.teardown_exact(nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


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
    """`sparse-serve WORDS` in a child; the exit status and what it wrote."""
    from sparse_serve.cli.main import main

    prepare()
    argv = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"

        def child() -> int:
            for descriptor, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            logging.getLogger().handlers.clear()
            for handler in logging.getLogger("vllm").handlers:
                assert isinstance(handler, logging.StreamHandler)
                handler.setStream(sys.stderr)
            return main(argv)

        status = fork(child)
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


class Nursery:
    """A process that has imported vLLM and nothing else: its children may start what does not survive a fork.

    gRPC is such a thing: a server hangs in a child of a process that has had one, as the pytest process may have.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`command` in that process, with the environment of this one."""
        argv = [str(word) for word in words]
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"argv": argv, "environment": dict(os.environ)}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(argv, answer["status"], answer["out"], answer["err"])

    def close(self) -> None:
        """End the process and what it may still be running."""
        below = processes.descendants(self._process.pid)
        self._process.kill()
        processes.kill(below)
        self._process.communicate()


def _serve_commands() -> None:
    """The loop of the process of a `Nursery`: one request a line on stdin, one answer a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints while it is imported is no answer
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.clear()
        os.environ.update(request["environment"])
        done = command(*request["argv"])
        answer = {"status": done.returncode, "out": done.stdout, "err": done.stderr}
        print(json.dumps(answer), file=answers, flush=True)


def fork(work: Callable[[], int]) -> int:
    """Exit status of a child that does `work`; negative, the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            # As TORCHDYNAMO_DISABLE says, which is read too early; and not in this process, whose later tests compile.
            torch._dynamo.config.disable = True
            status = work()
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:  # the time limit of a test, which is raised here, or Ctrl-C
        below = processes.descendants(pid)
        os.kill(pid, signal.SIGKILL)
        processes.kill(below)
        os.waitpid(pid, 0)
        raise


if __name__ == "__main__":
    _serve_commands()

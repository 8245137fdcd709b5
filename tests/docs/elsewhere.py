"""Commands of README and the manual that `test_console` does not run: who runs them, and why nobody does.

A block that is not run says why in `<!-- not run: ... -->` in front of it; every such reason is here, with the tests
that have what can be had of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.docs.pages import blocks

RUN_BY = {
    "sparse-serve doctor": "tests/vllm/test_console.py",
    "sparse-serve tune": "tests/vllm/test_console.py",
    "sparse-serve bench kernels": "tests/vllm/test_console.py",
    "sparse-serve generate": "tests/vllm/test_services.py",
    "curl": "tests/vllm/test_services.py",
}
"""How commands begin that take vLLM's imports or a server, and which tests run them as they are shown."""

LIKE = {
    "sparse-serve serve": "tests/vllm/test_starts.py",
    "sparse-serve bench serve": "tests/vllm/test_bench_serve.py",
    "sparse-serve gate --dense": "tests/vllm/test_gate.py",
    "sparse-serve gate run": "tests/vllm/test_gate_servers.py",
    "sparse-serve gate record": "tests/sparse_serve/gate/test_baseline.py",
}
"""How commands begin that start engines, tens of seconds each, and which tests run them on other models."""

NOT_RUN: Mapping[str, Sequence[str]] = {
    "installs an environment, which takes a network": ("tests/release/wheel.py", "tests/vllm/test_demo.py"),
    "prunes a model of 8 billion weights": ("tests/vllm/test_demo.py",),
    "takes a quarter of an hour": ("tests/vllm/test_bench_serve.py",),
    "takes hours": ("tests/bench/test_quality_table.py", "tests/bench/test_frontier.py"),
    "takes minutes of rounds": ("tests/sparse_serve/gate/test_speed.py",),
    "takes an NVIDIA GPU": ("tests/gpu/__main__.py",),
    "takes grpcurl": ("tests/sparse_serve/api/test_grpc_admin.py",),
    "takes docker": ("tests/deploy/test_container.py", "tests/deploy/test_compose.py"),
    "takes a cluster": ("tests/deploy/test_chart.py",),
    "takes servers behind nginx": ("tests/deploy/test_rolling.py", "tests/deploy/test_roll.py"),
    "changes a host, as root": ("tests/deploy/test_nginx.py", "tests/deploy/test_roll.py"),
    "takes Ray": ("tests/deploy/test_ray.py",),
    "takes several hosts": ("tests/deploy/test_hosts.py", "tests/deploy/test_train.py"),
    "takes two machines with eight GPUs each": ("tests/vllm/test_parallel.py",),
    "downloads vLLM": ("tests/release/test_vllm_symbols.py",),
    "a release takes minutes, and a clean tree": ("tests/release/test_publish.py",),
}
"""Why blocks are not run, and the tests that have what can be had of them."""


def is_run_here(command: str) -> bool:
    """Whether `test_console` runs it."""
    return not plain(command).startswith((*RUN_BY, *LIKE))


def run_by(test: str) -> list[str]:
    """The commands that a test of `RUN_BY` has to run: each once, in the order of pages."""
    starts = tuple(start for start, runner in RUN_BY.items() if runner == test)
    shown = [plain(command) for block in blocks() if not block.why_not for command in block.commands]
    return [command for command in dict.fromkeys(shown) if command.startswith(starts)]


def plain(command: str) -> str:
    """Without the folder of the environment, and without a comment behind it."""
    return command.removeprefix(".venv/bin/").partition("   #")[0].rstrip()

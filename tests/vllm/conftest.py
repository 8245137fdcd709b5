"""Real vLLM on the CPU. Warnings of vLLM and its dependencies are not ours to fix."""

from __future__ import annotations

import os

import pytest

from tests.vllm import nursery


@pytest.fixture(autouse=True)
def _cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = list(filter(_is_here, items))
    threads = os.environ["OMP_NUM_THREADS"]
    if threads != "1" and any(item.path.stem not in nursery.AS_USERS_DO for item in here):
        raise pytest.UsageError(
            f"OMP_NUM_THREADS is {threads}, expected 1 for tests/vllm: they fork this process, and a child hangs where "
            "its parent has used torch's threads; unset it"
        )
    for item in here:
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not _is_here(item) or item.path.stem in nursery.AS_USERS_DO:
        return None
    nursery.run_item(item, nextitem)
    return True


def _is_here(item: pytest.Item) -> bool:
    return "/tests/vllm/" in str(item.path)

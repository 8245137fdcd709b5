"""Real vLLM on the CPU. Warnings of vLLM and its dependencies are not ours to fix."""

from __future__ import annotations

import os

import pytest

from tests.vllm import nursery

NURSERY = pytest.StashKey[nursery.Nursery]()


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


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and any(map(_is_here, session.items)):
        # All processes then share the folder of temporary ones; each would else begin by emptying it.
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        session.config.stash[NURSERY] = nursery.Nursery(session.items)


@pytest.fixture(scope="session")
def vllm_nursery(request: pytest.FixtureRequest) -> nursery.Nursery:
    """The nursery of this pytest process."""
    return request.config.stash[NURSERY]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not _is_here(item) or item.path.stem in nursery.AS_USERS_DO:
        return None
    item.config.stash[NURSERY].run_item(item, nextitem)
    return True


def _is_here(item: pytest.Item) -> bool:
    return "/tests/vllm/" in str(item.path)

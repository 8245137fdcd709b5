"""Real vLLM, in-process and on the CPU. Warnings of vLLM and its dependencies are not ours to fix."""

import pytest


@pytest.fixture(autouse=True)
def _cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/vllm/" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore"))

"""Fixtures shared by all tests: tiny models and text, built once per session; no network, no progress bars."""

from __future__ import annotations

import gc
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As `make test` does. A process that has used torch's threads must not fork, which the tests of vLLM do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Repositories that tests make are nobody's: none of the signatures, hooks and names of whoever runs them.
GIT = {"commit.gpgsign": "false", "core.hooksPath": os.devnull, "user.name": "a", "user.email": "a@example.com"}
for count, (name, value) in enumerate(GIT.items(), int(os.environ.get("GIT_CONFIG_COUNT", "0"))):
    os.environ |= {f"GIT_CONFIG_KEY_{count}": name, f"GIT_CONFIG_VALUE_{count}": value}
    os.environ["GIT_CONFIG_COUNT"] = str(count + 1)
# How fast a machine makes examples says nothing of what is tested with them.
settings.register_profile("sparse-serve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sparse-serve")


ModelDir = Callable[..., Path]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `-n 2 --dist loadfile`, which `make test` says."""
    from tests.lanes import Lanes

    return Lanes(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Each run of maskgen collects garbage a few times, and need not look through what imports and collection made."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the caches of whoever runs the tests; processes that tests start inherit it."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """`model_dir("qwen2", dtype=torch.bfloat16)` -> a Hugging Face directory, made on first use. Do not write to it."""
    from tests import models

    made: dict[str, Path] = {}

    def get(kind: str = "llama", **options: object) -> Path:
        key = f"{kind} {sorted(options.items())}"
        if key not in made:
            made[key] = models.save(kind, tmp_path_factory.mktemp(kind) / "model", **options)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 15,000 tokens of text for the tiny tokenizer. Do not write to it."""
    from tests import models

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(models.TEXT, "utf-8")
    return path


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a bare number: no home directory, in no way one could be found."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture(autouse=True)
def _no_progress_bars(request: pytest.FixtureRequest) -> Iterator[None]:
    """transformers draws bars on stderr; tests that compare stderr must not see them."""
    if "model_dir" in request.fixturenames:
        from transformers.utils import logging

        logging.disable_progress_bar()
    yield

"""Figures come back for the same facts, and for no others; a cache that cannot be used is no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_serve.tuning import cache as machine_cache

FACTS = {"shape": [64, 32], "device": "here"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_figures_come_back_for_the_same_facts_only() -> None:
    machine_cache.keep("kind-1", FACTS, {"seconds": 1.5})
    assert machine_cache.recall("kind-1", dict(reversed(FACTS.items()))) == {**FACTS, "seconds": 1.5}
    assert machine_cache.recall("kind-2", FACTS) == {}
    assert machine_cache.recall("kind-1", {**FACTS, "device": "there"}) == {}
    machine_cache.keep("kind-1", FACTS, {"seconds": 2.5})
    assert machine_cache.recall("kind-1", FACTS)["seconds"] == 2.5


@pytest.mark.parametrize("damage", ["", "[]", "nonsense", "{"])
def test_damage_reads_as_nothing(damage: str) -> None:
    machine_cache.keep("kind-1", FACTS, {"seconds": 1.5})
    machine_cache.path("kind-1", FACTS).write_text(damage)
    assert machine_cache.recall("kind-1", FACTS) == {}


def test_nothing_can_be_written_or_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine_cache.keep("kind-1", FACTS, {"seconds": 1.5})
    assert machine_cache.recall("kind-1", FACTS) == {}


def test_versions() -> None:
    assert machine_cache.version("torch") is not None
    assert machine_cache.version("no-such-package") is None

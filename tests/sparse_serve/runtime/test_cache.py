"""Figures come back for the same facts, and for no others; a cache that cannot be used is said once and is no error."""

from __future__ import annotations

import sys
from pathlib import Path

import platformdirs
import pytest

from sparse_serve.runtime import cache

FACTS = {"shape": [64, 32], "device": "here"}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache"


def test_figures_come_back_for_the_same_facts_only() -> None:
    cache.keep("kind-1", FACTS, {"seconds": 1.5})
    assert cache.recall("kind-1", dict(reversed(FACTS.items()))) == {**FACTS, "seconds": 1.5}
    assert cache.recall("kind-2", FACTS) == {}
    assert cache.recall("kind-1", {**FACTS, "device": "there"}) == {}
    cache.keep("kind-1", FACTS, {"seconds": 2.5})
    assert cache.recall("kind-1", FACTS)["seconds"] == 2.5
    with cache.bypass_cache():
        assert cache.recall("kind-1", FACTS) == {}


def test_where_files_lie(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = cache.path("kind-1", FACTS).name
    assert cache.path("kind-1", FACTS) == folder / "sparse-serve" / "kind-1" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    system = platformdirs.user_cache_path("sparse-serve", appauthor=False)
    assert cache.path("kind-1", FACTS) == system / "kind-1" / name


@pytest.mark.parametrize("damage", ["", "[]", "nonsense", "{"])
def test_damage_is_said_and_reads_as_nothing(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.keep("kind-1", FACTS, {"seconds": 1.5})
    file = cache.path("kind-1", FACTS)
    file.write_text(damage)
    assert cache.recall("kind-1", FACTS) == cache.recall("kind-1", FACTS) == {}
    (said,) = caplog.messages
    assert str(file) in said and "measured again" in said


def test_a_first_start_has_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    assert cache.recall("kind-1", FACTS) == {}
    cache.keep("kind-1", FACTS, {"seconds": 1.5})
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for shape in (1, 2):
        assert cache.recall("kind-1", {"shape": shape}) == {}
        cache.keep("kind-1", {"shape": shape}, {"seconds": 1.5})
    (said,) = caplog.messages
    assert "cannot be kept" in said and str(tmp_path / "file") in said and "set XDG_CACHE_HOME" in said


@pytest.mark.parametrize("missing", ["home", "platformdirs"])
def test_no_place_for_a_cache_is_said_and_nothing_is_written(
    missing: str, no_home: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    if missing == "platformdirs":
        monkeypatch.setitem(sys.modules, "platformdirs", None)
    cache.keep("kind-1", FACTS, {"seconds": 1.5})
    assert cache.recall("kind-1", FACTS) == {} and not list(tmp_path.iterdir())
    assert len(caplog.messages) == 2 and all(missing in said for said in caplog.messages)


def test_older_releases_of_platformdirs_leave_the_home_unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda app, appauthor: Path("~/.cache") / app)
    with pytest.raises(OSError, match="no home directory"):
        cache.path("kind-1", FACTS)

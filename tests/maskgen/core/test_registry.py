"""The folder is the registry: what is listed is what is there, and a name never becomes a path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from maskgen.core import registry
from maskgen.core.errors import DataError, RecipeError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    root = tmp_path / "some_extensions"
    root.mkdir()
    for name in ("__init__", "wanda", "adam", "_helper", "broken"):
        (root / f"{name}.py").write_text("raise OSError('imported')" if name == "broken" else f"NAME = {name!r}")
    (root / "notes.txt").write_text("")
    (tmp_path / "outside.py").write_text("raise OSError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_extensions")
    for name in [name for name in sys.modules if name.startswith("some_extensions")]:
        del sys.modules[name]


def test_names_are_files_and_nothing_is_imported(package: ModuleType) -> None:
    assert registry.names(package) == ["adam", "broken", "wanda"]
    assert not [name for name in sys.modules if name.startswith("some_extensions.")]


def test_loading_imports_only_what_was_asked_for(package: ModuleType) -> None:
    assert registry.load(package, "adam").NAME == "adam"
    assert "some_extensions.wanda" not in sys.modules


def test_a_folder_may_be_divided_into_folders(package: ModuleType) -> None:
    inner = Path(package.__path__[0], "inner")
    inner.mkdir()
    for name in ("__init__", "_helper", "ria"):
        (inner / f"{name}.py").write_text(f"NAME = {name!r}")
    importlib.invalidate_caches()
    assert registry.names(package) == ["adam", "broken", "ria", "wanda"]
    assert "some_extensions.inner" not in sys.modules
    assert registry.load(package, "ria").NAME == "ria"
    assert registry.load(package, "adam").NAME == "adam"


@pytest.mark.parametrize("asked_for", ["adam", "wanda"])
def test_two_files_of_one_name_are_an_error(package: ModuleType, asked_for: str) -> None:
    for folder in ("first", "second"):
        inner = Path(package.__path__[0], folder)
        inner.mkdir()
        for name in ("__init__", "adam" if folder == "second" else "ria"):
            (inner / f"{name}.py").write_text("")
    importlib.invalidate_caches()
    message = r"some_extensions\.adam and some_extensions\.second\.adam are both called 'adam'"
    with pytest.raises(ImportError, match=message):
        registry.load(package, asked_for)
    with pytest.raises(ImportError, match=message):
        registry.names(package)


@pytest.mark.parametrize("name", ["Adam", "adam.py", "", ".", "..outside", "../outside", "_helper", "__init__", "os"])
def test_unknown_names_list_the_known(package: ModuleType, name: str) -> None:
    with pytest.raises(RecipeError, match=r"in some_extensions; expected one of \['adam', 'broken', 'wanda'\]"):
        registry.load(package, name)


def test_the_error_class_is_the_callers(package: ModuleType) -> None:
    with pytest.raises(DataError):
        registry.load(package, "nothing", DataError)


def test_an_extension_that_fails_to_import_says_so_itself(package: ModuleType) -> None:
    with pytest.raises(OSError, match="imported"):
        registry.load(package, "broken")

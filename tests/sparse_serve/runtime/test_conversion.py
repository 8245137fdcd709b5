"""Copies of other tools' models. What they hold is tested in `tests/maskgen/export` and `tests/vllm`."""

from pathlib import Path

import pytest

from maskgen.core import foreign
from sparse_serve.runtime import conversion
from sparse_serve.runtime.errors import SettingsError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("a")
    return tmp_path / "model"


def test_the_folder_that_a_server_is_started_in_is_no_place_for_modules(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "maskgen.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(source)
    with pytest.raises(SettingsError, match=r"could not be converted: .*--no-convert"):
        conversion._convert(Path(), None, source.parent / "copy")
    assert not (source / "executed").exists()


def test_another_template_is_another_copy(source: Path) -> None:
    before = conversion._key(source, None)
    (source / "chat_template.jinja").write_text("bb")
    assert conversion._key(source, None) != before


@pytest.mark.parametrize(("kind", "is_served"), [(foreign.MASKED, True), (foreign.MARLIN, False)])
def test_zeros_that_cannot_be_made_ours_are_served_as_before(
    kind: str, is_served: bool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise SettingsError("no decoder")

    monkeypatch.setattr(foreign, "foreign_kind", lambda path: kind)
    monkeypatch.setattr(conversion, "_convert", fails)
    told: list[str] = []
    wanted = conversion.Conversion(tell=told.append)
    if is_served:
        assert wanted.prepare(source, "model", lambda: None) == conversion.Prepared(source)
        assert told[-1] == "no decoder; served dense, as it is stored"
    else:
        with pytest.raises(SettingsError, match="no decoder"):
            wanted.prepare(source, "model", lambda: None)


def test_what_is_in_the_way_is_said_before_a_copy_is_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(foreign, "foreign_kind", lambda path: foreign.MARLIN)
    monkeypatch.setattr(conversion, "_convert", lambda source, masks, copy: made.append(copy))

    def check() -> None:
        raise SettingsError("a wrong flag")

    with pytest.raises(SettingsError, match="a wrong flag"):
        conversion.Conversion().prepare(source, "model", check)
    assert not made and not (source.parent / "cache").joinpath("sparse-serve/converted").exists()
    conversion.Conversion().prepare(source, "name", lambda: None)
    assert [copy.name.partition("--")[0] for copy in made] == ["name"]

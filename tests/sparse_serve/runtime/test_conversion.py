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
    if is_served:
        assert conversion.prepare(str(source), None, [], told.append) == conversion.Prepared(str(source))
        assert told[-1] == "no decoder; served dense, as it is stored"
    else:
        with pytest.raises(SettingsError, match="no decoder"):
            conversion.prepare(str(source), None, [], told.append)


@pytest.mark.parametrize(
    "flag", ["--hf-overrides", "--hf-overrides={}", "--hf-overrides.rope.type=x", "--hf_overrides"]
)
def test_a_flag_is_given_in_every_form_that_vllm_has(flag: str) -> None:
    assert conversion._is_given("--hf-overrides", ["--dtype=auto", flag])
    assert not conversion._is_given("--served-model-name", [flag])

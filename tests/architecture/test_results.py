"""The tables and the picture of README and the manual are what the records say."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from tests.architecture.source import ROOT
from tests.bench import plots, record, schema, served_table, tables
from tests.bench.tables.kernels import COMMIT, speedups

PAGES = {path: path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
KERNELS_COMMIT = re.compile(r"at commit `(\w+)`[^`]*`tests/bench/results/kernels--cpu")
NAMED = re.compile(r"`(?:tests/bench/results/)?([a-z0-9]+(?:-[a-z0-9]+)*--[\w*.-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_records(page: Path) -> None:
    assert tables.filled(PAGES[page]) == PAGES[page], "run `make reference`"


def test_every_table_is_on_a_page() -> None:
    assert sorted({name for text in PAGES.values() for name in tables.names(text)}) == sorted(tables.TABLES)


def test_a_page_with_another_number_is_found() -> None:
    readme = PAGES[ROOT / "README.md"]
    assert "| 2.25 to 2.76 |" in readme
    assert tables.filled(readme.replace("| 2.25 to 2.76 |", "| 2.25 to 2.96 |")) == readme
    with pytest.raises(KeyError):
        tables.filled("<!-- table: of nothing -->\n<!-- /table -->")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_pages_name_the_commit_of_the_kernels(page: str) -> None:
    assert KERNELS_COMMIT.findall((ROOT / page).read_text("utf-8")) == [COMMIT]
    assert all(map(speedups, (f"cpu-{dtype}-2threads" for dtype in ("bfloat16", "float32", "float16"))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_served_peers_are_the_results(page: Path) -> None:
    for name, table in served_table.BLOCK.findall(PAGES[page]):
        assert table == served_table.markdown(schema.read(schema.RESULTS / name)), name


def test_a_quality_table_has_a_record_once() -> None:
    """A row that was measured again took the place of the one before: `tests.bench.superseded`."""
    for label in ("demo", "reference-7m"):
        rows = [(result["row"], result["seed"]) for result in record.load("quality", label)]
        assert len(set(rows)) == len(rows), label


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_records_that_a_page_names_are_there(page: Path) -> None:
    files = [file.name for file in schema.RESULTS.iterdir()]
    for name in NAMED.findall(PAGES[page]):
        pattern = re.compile(re.escape(name).replace(r"\*", ".*"))
        assert any(pattern.fullmatch(file) for file in files), f"{page.name} names {name}"


def test_the_picture_is_that_of_the_record(tmp_path: Path) -> None:
    (pinned,) = re.findall(r"(?m)^matplotlib==(.*)$", (ROOT / "deploy/locks/cpu.txt").read_text("utf-8"))
    if importlib.metadata.version("matplotlib") != pinned:
        pytest.skip(f"another matplotlib than the lock's {pinned} may draw another file")
    plots.PLOTS[plots.KERNELS](tmp_path / plots.KERNELS)
    drawn, kept = ((folder / plots.KERNELS).read_text("utf-8") for folder in (tmp_path, ROOT / "docs"))
    assert drawn == kept, "run `make reference`"

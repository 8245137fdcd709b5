"""The tables of README and the manual are what the result files say."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

import pytest

from tests.architecture.source import ROOT
from tests.bench import record, schema, served_table
from tests.bench.quality import ROWS, WHAT
from tests.bench.quality_table import markdown

BLOCK = re.compile(r"<!-- quality of (\S+): .*? -->\n(.*?)\n<!-- /quality -->", re.DOTALL)
AMX_TABLE = re.compile(r"<!-- kernels: (\S+) -->\n(.*?)\n<!-- /kernels -->", re.DOTALL)
AMX_ROW = re.compile(r"^\| (\d+ x \d+) \| ([^|]+) \| (.*) \|$", re.MULTILINE)
CANDIDATES = {"bfloat16, in tiles": "cpu", "int8": "cpu int8", "bfloat16, by AVX-512": "cpu avx512"}
"""How the tables of AMX name what was timed."""
README, RESULTS = "README.md", "docs/results.md"
KERNELS_COMMIT = re.compile(r"at commit `(\w+)`[^`]*`tests/bench/results/kernels--cpu")


def newest(label: str) -> list[dict[str, Any]]:
    """The last result of every row and seed, of the model with this label."""
    return list({(result["row"], result["seed"]): result for result in record.load(WHAT, label)}.values())


def test_the_tables_in_the_documentation_are_the_results() -> None:
    texts = [file.read_text("utf-8") for file in (ROOT / README, *sorted((ROOT / "docs").glob("*.md")))]
    tables = [found for text in texts for found in BLOCK.findall(text)]
    assert tables
    for label, table in tables:
        assert table == markdown(newest(label), {row.name: row.weights for row in ROWS}), label


@pytest.mark.parametrize(("page", "shows_all"), [(README, False), (RESULTS, True)])
def test_tables_of_kernels_are_the_results(page: str, shows_all: bool) -> None:
    """Lowest and highest speedup at the commit the page names, by shape, dtype and values; the small layers' too."""
    text = (ROOT / page).read_text("utf-8")
    (commit,) = KERNELS_COMMIT.findall(text)
    files = sorted((ROOT / "tests/bench/results").glob("kernels--cpu-*-2threads*.json"))
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    found: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for result in run["results"] if str(run.get("commit")).startswith(commit) else []:
            for name, values in (("cpu", run["dtype"]), ("cpu int8", "int8")):
                kind = (f"{result['out_features']} x {result['in_features']}", run["dtype"], values)
                found[kind][result["tokens"]].append(result["speedup"][name])
    shown = set()
    for shape, row in re.findall(r"^\| (\d+ x \d+) \| (.*) \|$", text, re.MULTILINE):
        cells = row.split(" | ")
        if len(cells) in (7, 9):  # another table has other columns; small layers are in bfloat16
            kind = (shape, *(cells[:-7] or ["bfloat16", "bfloat16"]))
            assert cells[-7:] == [_range(speedups) for _, speedups in sorted(found[kind].items())], kind
            shown.add(kind)
    assert shown
    if shows_all:
        assert shown >= {kind for kind in found if kind[2] != "int8"}, f"{page} leaves out a shape that was measured"


def test_tables_of_amx_are_the_results() -> None:
    """One run each, of the files that a table names."""
    tables = AMX_TABLE.findall((ROOT / RESULTS).read_text("utf-8"))
    assert tables
    for pattern, table in tables:
        runs = [json.loads(file.read_text("utf-8")) for file in (ROOT / "tests/bench/results").glob(pattern)]
        assert runs and all(run["isa"] == "amx" for run in runs), pattern
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for result in (result for run in runs for result in run["results"]):
            for name, speedup in result["speedup"].items():
                found[f"{result['out_features']} x {result['in_features']}", name].append(f"{speedup:.2f}")
        assert {
            (shape, CANDIDATES[values]): cells.split(" | ") for shape, values, cells in AMX_ROW.findall(table)
        } == found


def test_tables_of_served_peers_are_the_results() -> None:
    for page in (ROOT / README, *sorted((ROOT / "docs").glob("*.md"))):
        for name, table in served_table.BLOCK.findall(page.read_text("utf-8")):
            assert table == served_table.markdown(schema.read(schema.RESULTS / name)), f"{page.name}: {name}"


def _range(numbers: list[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"

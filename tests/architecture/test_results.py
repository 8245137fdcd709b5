"""What README says of quality and kernels is what the result files say. A new result that says something else fails."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from tests.architecture.source import ROOT
from tests.bench import record
from tests.bench.quality import ROWS, WHAT, Row
from tests.bench.quality_table import markdown

LABEL = "reference-7m"
BLOCK = re.compile(r"<!-- quality: .*? -->\n(.*?)\n<!-- /quality -->", re.DOTALL)
ONE_SHOT = ["magnitude", "wanda", "ria", "sparsegpt, mask only"]


def newest() -> list[dict[str, Any]]:
    """The last result of every row and seed."""
    return list({(result["row"], result["seed"]): result for result in record.load(WHAT, LABEL)}.values())


def perplexities(row: str) -> Iterator[dict[str, float]]:
    found = [result["perplexity"] for result in newest() if result["row"] == row]
    assert found, f"no result of {row}"
    yield from found


def test_the_table_in_the_readme_is_the_results() -> None:
    (table,) = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    assert table == markdown(newest(), {row.name: row.weights for row in ROWS})


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("maskllm", ["sparsegpt", *ONE_SHOT, "proxsparse"]),
        ("proxsparse", ONE_SHOT),
        ("admm", ["sparsegpt"]),
        ("adaptive_sparse", ["maskllm", "proxsparse", "admm", *ONE_SHOT]),
        ("maskprune", ["structured magnitude", "structured taylor"]),
    ],
)
def test_the_order_holds_on_every_text_and_seed(better: str, worse: list[str]) -> None:
    for mine in perplexities(better):
        for name in worse:
            for other in perplexities(name):
                behind = {text: (mine[text], other[text]) for text in mine if mine[text] >= other[text]}
                assert not behind, f"{better} against {name}: {behind}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.reorder], ids=lambda row: row.name)
def test_reordered_neurons_help_on_every_text(row: Row) -> None:
    """Against the same recipe and seed on the model as it was."""
    found = {(result["row"], result["seed"]): result["perplexity"] for result in newest()}
    (plain,) = (
        other.name for other in ROWS if (other.recipe, other.overrides) == (row.recipe, ()) and not is_varied(other)
    )
    for text, reordered in found[row.name, 0].items():
        assert reordered < found[plain, 0][text], text


def is_varied(row: Row) -> bool:
    return bool(row.reorder or row.prior or row.domain)


@pytest.mark.parametrize("domain", ["peps", "reviews"])
def test_a_domains_mask_is_best_at_home_and_transfer_beats_from_scratch(domain: str) -> None:
    text = f"{domain}.valid"
    (general, *_), (scratch,), (transfer,) = (
        [found[text] for found in perplexities(row)]
        for row in (
            "maskllm",
            f"maskllm, 100 steps, {domain}, from scratch",
            f"maskllm, 100 steps, {domain}, transfer",
        )
    )
    assert transfer < scratch < general


def test_the_kernels_table_in_the_readme_is_the_results() -> None:
    """Lowest and highest speedup in the last commit measured, by shape, dtype and values; the small layers' too."""
    files = sorted((ROOT / "tests/bench/results").glob("kernels--cpu-*-2threads*.json"))
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    last = max(runs, key=lambda run: str(run["created"]))["commit"]
    found: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for result in run["results"] if run.get("commit") == last else []:
            for name, values in (("cpu", run["dtype"]), ("cpu int8", "int8")):
                kind = (f"{result['out_features']} x {result['in_features']}", run["dtype"], values)
                found[kind][result["tokens"]].append(result["speedup"][name])
    rows = re.findall(r"^\| (\d+ x \d+) \| (.*) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    shown = 0
    for shape, cells in [(shape, cells.split(" | ")) for shape, cells in rows]:
        if len(cells) in (7, 9):  # another table has other columns; small layers are in bfloat16
            kind = (shape, *(cells[:-7] or ["bfloat16", "bfloat16"]))
            assert cells[-7:] == [_range(speedups) for _, speedups in sorted(found[kind].items())], kind
            shown += 1
    assert shown == 18


def _range(numbers: list[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"

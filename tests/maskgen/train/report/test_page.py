"""The page: what it says is what was logged; nothing in a log becomes markup; it can be read by everybody."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import maskgen
from maskgen.core.errors import FormatError
from maskgen.train.log import LOG_FILE, read
from maskgen.train.report import page as report
from maskgen.train.report.runs import load
from maskgen.train.report.tables import MOST_HEAT_PERCENT
from tests.maskgen import logs
from tests.maskgen.cli.test_parser import run

ModelDir = Callable[..., Path]
VOID = {"meta", "br"}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror='alert(2)' \"{{ 7 * 7 }}\">&amp;"


class Page(HTMLParser):
    """Every element with its attributes, and the text; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts)).replace("\xa0", " ")

    def attributes(self, name: str) -> list[str]:
        return [str(values[name]) for _, values in self.elements if name in values]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take half a second each, and most of what is tested is beside them."""
    monkeypatch.setattr(report, "curves", lambda runs: [])


def page_of(*paths: Path) -> Page:
    return Page(report.render([load(path) for path in paths]))


def test_numbers_of_a_run(tmp_path: Path, undrawn: None) -> None:
    page = page_of(logs.write(tmp_path / "log"))
    assert "maskllm 2:4 50.00 60.00 55.00 +10.00% 60.00% 4 256 0.2 12" in page.text
    assert "maskllm on tiny" in page.text and "unfinished" not in page.text
    assert "6 windows of 32 tokens (31 predicted in each), matrix products in bfloat16" in page.text
    assert "nats" in page.text and "hard masks" in page.text
    assert '"scale": 100.0' in page.text and "hardware.name x86_64" in page.text and "sha256:basebasebase" in page.text


def test_the_page_stands_alone_and_is_well_formed(tmp_path: Path) -> None:
    page = page_of(logs.write(tmp_path / "a"), logs.write(tmp_path / "b", [logs.step(1)]))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not page.attributes("src") and all(link.startswith("#") for link in page.attributes("xlink:href"))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {name for names in page.attributes("aria-labelledby") for name in names.split()} <= set(ids)
    assert page.elements[0] == ("html", {"lang": "en"})
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.attributes("content")


def test_nothing_in_a_log_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(0)<"
    folder.mkdir()
    masks = {f"layers.0.{HOSTILE}": {"agreement": 0.5, "patterns": {"1100": 1}}}
    changes: dict[str, Any] = {
        "model": HOSTILE, "method": HOSTILE, "pattern": HOSTILE, "dtype": HOSTILE, "data": [HOSTILE],
        "digests": {"recipe": HOSTILE, HOSTILE: HOSTILE}, "hardware": {HOSTILE: [HOSTILE]}, HOSTILE: HOSTILE,
        "torch": "\ud800\x00",
    }  # fmt: skip
    path = logs.write_raw(folder / LOG_FILE, {"kind": "header", **logs.header(**changes)}, logs.layers(masks))
    out = tmp_path / "report.html"
    report.write([folder, logs.write(tmp_path / "other")], out)
    page = Page(out.read_text("utf-8"))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in page_of(tmp_path / "other").elements} | {
        "table",
        "span",
    }
    assert page.text.count(HOSTILE) >= 10 and "49" not in page.text.split("Recipes")[0].split("Curves")[0]
    assert str(folder) in page.text and path.is_file()


@pytest.mark.parametrize("records", [[], [logs.look(0, 9.0, 8.0)], [logs.step(1)], [logs.step(1), logs.look(1, 1e304)]])
def test_runs_at_work(records: list[dict[str, Any]], tmp_path: Path) -> None:
    page = page_of(logs.write(tmp_path / "log", records))
    steps = sum(record["kind"] == "step" for record in records)
    assert f"unfinished: {steps} of 4 steps" in page.text and "Written at the end of the run." in page.text
    assert ("has not been evaluated yet" in page.text) == all(record["kind"] != "eval" for record in records)
    assert ("No step and no evaluation is in the log yet." in page.text) == (not records)
    assert ("1.00e+304" in page.text) == (len(records) == 2)


def test_what_cannot_be_compared_is_said(tmp_path: Path, undrawn: None) -> None:
    plain, same = logs.write(tmp_path / "a"), logs.write(tmp_path / "b")
    assert not [
        note for note in ("texts differ", "different masks", "different dense") if note in page_of(plain, same).text
    ]
    assert "The recipes are the same." in page_of(plain, same).text
    for kind, note in {"data": "texts differ", "prior": "different masks", "base": "different dense"}.items():
        assert note in page_of(plain, logs.write(tmp_path / "c", digests={kind: None})).text
    text = page_of(plain, logs.write(tmp_path / "d", lr=0.5, window_tokens=64)).text
    assert "train.lr 0.001 0.5" in text and "train.window_tokens 32 64" in text and "train.seed 0 0" not in text
    bos = {"ids": [2], "own": True}
    assert "BOS in each (as the tokenizer does by itself)" in page_of(logs.write(tmp_path / "e", bos=bos)).text
    assert "run 1: 6 windows of 32 tokens" in text and "run 2: 6 windows of 64 tokens" in text


def test_runs_with_different_layers_and_patterns(tmp_path: Path, undrawn: None) -> None:
    masks = {"h.0.fc": {"agreement": 0.4, "patterns": {"11110000": 2}}, "h.1.fc": {"agreement": 1.0, "patterns": {}}}
    wide = logs.write(tmp_path / "wide", [logs.layers({"h.0.fc": {"agreement": 1.0, "patterns": {}}})], pattern="8:16")
    page = page_of(logs.write(tmp_path / "a"), logs.write(tmp_path / "b", [logs.layers(masks)]), wide)
    assert {"h.0.fc: 40.00%", "model.layers.1.mlp.up_proj: 75.00%"} <= set(page.attributes("title"))
    assert "All layers, groups of 4" in page.text and "All layers, groups of 8" in page.text
    assert "Not logged: patterns of groups of more than 8 columns" in page.text


def test_writing(tmp_path: Path) -> None:
    log, out = logs.write(tmp_path / "log"), tmp_path / "new" / "report.html"
    assert report.write([log], out) == out.stat().st_size
    first = out.read_bytes()
    assert report.write([log], out) == len(first) and out.read_bytes() == first, "the same page every time"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    with pytest.raises(FormatError, match="is one of the logs"):
        report.write([log], tmp_path / "new" / ".." / "log")
    with pytest.raises(OSError):
        report.write([log], tmp_path)


@pytest.mark.parametrize("depth", [100, 700, 900, 5000])
@pytest.mark.parametrize("key", ["recipe", "other"])
def test_deep_nesting_is_no_crash(depth: int, key: str, tmp_path: Path, undrawn: None) -> None:
    line = json.dumps({"kind": "header", **logs.header(), "other": {}})
    opening = f'"{key}": {{'
    assert opening in line
    path = tmp_path / "deep"
    path.write_text(line.replace(opening, f'{opening}"x": {"[" * depth}{"]" * depth}, ').replace(", }", "}") + "\n")
    with contextlib.suppress(FormatError):
        assert report.write([path], tmp_path / "page.html")
    assert depth > 100 or (tmp_path / "page.html").is_file()


def test_a_real_run(model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "steps": 3, "batch": 2, "window_tokens": 32, "heldout_windows": 2, "distill_weight": 0.5, "dtype": "float32",
    }  # fmt: skip
    changes = [part for key, value in settings.items() for part in ("--set", f"train.{key}={value}")]
    out, page_file = tmp_path / "out", tmp_path / "report.html"
    recipe = tmp_path / "toy.toml"
    recipe.write_text('[method]\nname = "maskllm"\n[prior]\nname = "magnitude"\n')
    code, _, errors = run(
        capsys, "run", recipe, "--model", model_dir(), "--data", text_file, "--out", out, "--keep-work", *changes
    )
    assert (code, errors) == (0, "")
    code, text, errors = run(capsys, "report", out, tmp_path / "out.work", "--out", page_file)
    assert (code, errors) == (0, "") and f"wrote {page_file}" in text.replace("\n", "")
    page, looks = Page(page_file.read_text("utf-8")), [r for r in read(out / LOG_FILE) if r["kind"] == "eval"]
    assert (
        f"{looks[0]['dense_perplexity']:,.2f} {looks[0]['perplexity']:,.2f} {looks[-1]['perplexity']:,.2f}" in page.text
    )
    assert "The recipes are the same." in page.text and "unfinished" not in page.text
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 9


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.split(".")[0] == "matplotlib" or name.startswith("maskgen.train.report")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, errors = run(capsys, "report", logs.write(tmp_path / "log"), "--out", tmp_path / "report.html")
    assert code == 2 and not (tmp_path / "report.html").exists()
    assert errors == (
        "maskgen: error: maskgen report needs matplotlib, which is not installed: pip install 'sparse-serve[report]'\n"
    )


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "report", tmp_path / "nothing")
    assert code == 2 and errors.startswith("maskgen: error: ") and errors.count("\n") == 1


def colours(dark: bool) -> dict[str, str]:
    template = (resources.files(maskgen) / "train" / "report" / "report.html").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", blocks[dark]))


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2 contrast ratio of two colours in sRGB, 0 to 1."""
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (one, other)]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_curves_can_be_told_from_what_is_behind_them(dark: bool) -> None:
    palette = {name: rgb(colour) for name, colour in colours(dark).items()}
    for ground in ("page", "panel"):
        for text in ("ink", "muted", "warn"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
        for number in range(8):
            assert contrast(palette[f"run{number}"], palette[ground]) >= 3, (number, ground)
    share = MOST_HEAT_PERCENT / 100
    hottest = [
        share * heat + (1 - share) * panel for heat, panel in zip(palette["heat"], palette["panel"], strict=True)
    ]
    assert contrast(palette["ink"], hottest) >= 4.5

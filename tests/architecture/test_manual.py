"""The manual: `docs/reference/` is what the code says, and pages for users name commands, not modules of the tests."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.architecture.source import ROOT, files

README_LINES = 150
FOR_CONTRIBUTORS = {"docs/contributing.md"}
PAGES = [path for path in files() if path.endswith(".md") and path.startswith(("README", "docs/"))]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(generator: ModuleType) -> None:
    committed = {path.name: path.read_text("utf-8") for path in generator.OUT_DIR.iterdir()}
    assert generator.generate() == committed, "run `make reference`"


def test_the_reference_has_every_verb_setting_and_error(generator: ModuleType) -> None:
    """What the generator walks is private to argparse, prometheus_client and our tables: it may find less one day."""
    pages = generator.generate()
    for page, title in (
        ("maskgen.md", "## maskgen run\n"),
        ("sparse-serve.md", "## sparse-serve bench kernels\n"),
        ("sparse-serve.md", "| `--max-ppl-increase F` |"),
        ("settings.md", "| `--drain-s` | `SPARSE_SERVE_DRAIN_S` | `30.0` | 0 to 3600 |"),
        ("metrics.md", "| `sparse_serve_requests_total` | counter | `api`, `method`, `code` |"),
        (
            "errors.md",
            "| `OverloadedError` | `ServeError`, `RuntimeError` | 503, RESOURCE_EXHAUSTED; again after 1 s |",
        ),
        ("recipes.md", "## best-effort\n"),
        ("gate-yaml.md", "max_ppl_increase: 0.05"),
    ):
        assert title in pages[page]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", [page for page in PAGES if page not in FOR_CONTRIBUTORS])
def test_pages_for_users_run_no_module_of_the_tests(page: str) -> None:
    shown = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    assert not re.search(r"python -m\s+tests\b", shown), "name a verb of `make`, `maskgen` or `sparse-serve`"

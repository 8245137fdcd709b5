"""What the site has beside `docs/`: pages and files of the repository that pages link to, and plots.

Links between Markdown files are written as they are on disk, `../proto/checkpoint.md`, so that they work wherever the
repository is read. mkdocs knows only what is below `docs/`. `mkdocs.yml` names this file as a hook, which adds the
pages of `PAGES`, and any other file that a page links to, and rewrites the links to where these are in the site.

A plot stands as `<!-- plot: NAME: what it shows -->` on a line of a page, and is drawn from records (`tests/bench`)
when the site is built.
"""

from __future__ import annotations

import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"proto/checkpoint.md": "format.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""Markdown outside of `docs/` -> its page."""

_PLOT = re.compile(r"^<!-- plot: (\S+): (.*) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()[^)\s#]+")
_SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is outside of `docs/`."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    linked = {target for file in files.documentation_pages() for target in _targets(file.src_uri, file.content_string)}
    for target in sorted(linked):
        if (name := _in_site(target)) and files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    for name in sorted(
        {name for file in files.documentation_pages() for name, _ in _PLOT.findall(file.content_string)}
    ):
        files.append(File.generated(config, f"plots/{name}", content=_drawn(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put plots in their places, and point links at the site's pages and files."""
    here = page.file.src_uri
    top = posixpath.relpath(".", posixpath.dirname(here) or ".")
    markdown = _PLOT.sub(lambda found: f"![{found[2]}]({posixpath.join(top, 'plots', found[1])})", markdown)

    def link(found: re.Match[str]) -> str:
        name = _in_site(_resolved(here, found[0]))
        return posixpath.relpath(name, posixpath.dirname(here) or ".") if name else found[0]

    return _LINK.sub(link, markdown)


def _drawn(name: str) -> str:
    """A plot, as SVG."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.bench.plots import PLOTS

    with tempfile.TemporaryDirectory() as folder:
        PLOTS[name](Path(folder, name))
        return Path(folder, name).read_text("utf-8")


def _targets(page: str, markdown: str) -> set[str]:
    return {_resolved(page, link) for link in _LINK.findall(markdown)}


def _resolved(page: str, link: str) -> str:
    """A link of a page as a path from the repository's root."""
    source = _SOURCES.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(target: str) -> str | None:
    """Where the site has a file of the repository; None for what is none, such as an address."""
    if target in PAGES:
        return PAGES[target]
    if not (ROOT / target).is_file():
        return None
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"

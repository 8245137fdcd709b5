"""The `console` blocks of README and the manual: which commands they show, and which of these can be run here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from tests.architecture.source import ROOT, files

_BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]*?) -->\n)?```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block's commands as a shell takes them. `why_not` is the reason in its `<!-- not run: ... -->`, or ""."""

    page: str
    line: int
    commands: tuple[str, ...]
    why_not: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks() -> tuple[Block, ...]:
    """Every block, in the order of pages and places."""
    found = []
    for page in (path for path in files() if path.endswith(".md") and path.startswith(("README", "docs/"))):
        text = (ROOT / page).read_text("utf-8")
        matches = list(_BLOCK.finditer(text))
        assert len(matches) == text.count("```console"), f"{page}: a block that is indented, or has no end"
        for match in matches:
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(Block(page, line, commands(match[2]), match[1] or ""))
    return tuple(found)


def commands(body: str) -> tuple[str, ...]:
    """What stands behind each `$ `; a line that ends with a backslash goes on in the next."""
    lines = body.replace("\\\n", " ").splitlines()
    return tuple(line.removeprefix("$ ") for line in lines if line.startswith("$ "))

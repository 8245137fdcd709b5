"""The blocks of README and the manual: which commands they show, and which of these can be run here."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache

from tests.architecture.source import ROOT, files

_BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]*?) -->\n)?```(console|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_OWN_TESTS = {"docs/python.md": "tests/docs/test_python.py", "docs/serving.md": "tests/vllm/test_docs.py"}
"""Pages whose blocks of Python are one script."""


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
        assert len(matches) == len(re.findall("```(?:console|python)", text)), (
            f"{page}: a block is indented or has no end"
        )
        assert not re.search("```(?:sh|bash|shell)", text), f"{page}: commands stand in a block `console`, behind `$ `"
        for match in matches:
            is_console = match[2] == "console"
            if is_console or page not in _OWN_TESTS:
                shown = commands(match[3]) if is_console else (shlex.join(["python", "-c", match[3]]),)
                found.append(Block(page, text.count("\n", 0, match.start(3)) + 1, shown, match[1] or ""))
    return tuple(found)


def commands(body: str) -> tuple[str, ...]:
    """What stands behind each `$ `; a line that ends with a backslash goes on in the next."""
    lines = body.replace("\\\n", " ").splitlines()
    return tuple(line.removeprefix("$ ") for line in lines if line.startswith("$ "))

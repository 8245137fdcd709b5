"""Tables of README and the manual, made of records: `make reference` writes them between their marks.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`, indented as its mark is. A file here has the tables
of one subject: `TABLES`, from names to functions that return Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tests.bench.tables import costs, kernels, pruning, quality

TABLES: Mapping[str, Callable[[], str]] = {**costs.TABLES, **kernels.TABLES, **pruning.TABLES, **quality.TABLES}
_BLOCK = re.compile(r"^( *)<!-- table: ([^\n]+) -->\n(.*?)^ *<!-- /table -->$", re.DOTALL | re.MULTILINE)


def names(page: str) -> list[str]:
    """The tables that a page has."""
    return [block[2] for block in _BLOCK.finditer(page)]


def filled(page: str) -> str:
    """A page with its tables made anew. Raises KeyError for a name that is no table's."""

    def made(block: re.Match[str]) -> str:
        lines = [f"<!-- table: {block[2]} -->", *TABLES[block[2]]().splitlines(), "<!-- /table -->"]
        return "\n".join(block[1] + line for line in lines)

    return _BLOCK.sub(made, page)

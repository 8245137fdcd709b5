"""Reading `report.json`, and comparing two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from maskgen.core.errors import FormatError, clip
from maskgen.core.files import read_json
from maskgen.core.perplexity import Perplexity, Protocol
from sparse_serve.gate.checks import quality
from sparse_serve.gate.evidence import Evidence, Limits, Scores, TextEvidence
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.verdict import CheckResult, Verdict


def schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    text = (resources.files("sparse_serve.gate") / "report.schema.json").read_text("utf-8")
    return dict(json.loads(text))


def load(path: Path) -> dict[str, Any]:
    """A report, checked against the schema. Raises `FormatError`, `OSError`."""
    value = read_json(path)
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(value))
    if problem is not None:
        where = problem.json_path.removeprefix("$.")
        raise FormatError(f"{path}: is no report of this version: {where}: {clip(problem.message)}")
    return dict(value)


def compare(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> GateReport:
    """Judge the candidate of the `later` report against the candidate of the `earlier` one, on texts that both scored.

    Limits are the later report's. Quality is judged where the tokens are the same; speed is not, as its rounds were not
    measured side by side. Environments that differ are a result of their own, `inconclusive`. Raises `FormatError` when
    no text is in both.
    """
    before = {text["text"]: text["candidate"] for text in earlier["evidence"]["texts"]}
    pairs = [
        TextEvidence(text["text"], _scores(before[text["text"]]), _scores(text["candidate"]))
        for text in later["evidence"]["texts"]
        if text["text"] in before
    ]
    if not pairs:
        raise FormatError("the two reports have no text in common; measure the same texts in both")
    evidence, limits = Evidence(pairs), Limits(**later["limits"])
    results = [_environment(earlier["environment"], later["environment"]), *quality.run(evidence, limits)]
    provenance = {
        "base": earlier["provenance"].get("candidate"),
        "candidate": later["provenance"].get("candidate"),
        "base_created": earlier["provenance"].get("created"),
        "candidate_created": later["provenance"].get("created"),
    }
    return GateReport(results, evidence, limits, provenance, dict(later["environment"]))


def _environment(earlier: Mapping[str, str], later: Mapping[str, str]) -> CheckResult:
    names = sorted(earlier.keys() | later.keys())
    differing = [name for name in names if earlier.get(name) != later.get(name)]
    if not differing:
        return CheckResult(
            "environment", Verdict.PASS, f"both were measured alike: {', '.join(names)}", {"differing": 0.0}
        )
    said = "; ".join(f"{name} {clip(earlier.get(name))}, then {clip(later.get(name))}" for name in differing)
    summary = f"the two were not measured alike: {said}"
    return CheckResult("environment", Verdict.INCONCLUSIVE, summary, {"differing": float(len(differing))})


def _scores(stored: Mapping[str, Any]) -> Scores:
    def perplexity(value: Mapping[str, Any]) -> Perplexity:
        nll = [float("nan") if number is None else number for number in value["nll_per_window"]]
        return Perplexity(Protocol(**value["protocol"]), nll, value["scored_tokens_per_window"], value["tokens_digest"])

    offline = stored["offline"]
    return Scores(perplexity(stored["served"]), None if offline is None else perplexity(offline))

"""Reading `report.json`: what is none is refused by its JSON Schema."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from maskgen.core.errors import FormatError, clip
from maskgen.core.files import read_json
from sparse_serve.gate.verdict import CheckResult, worst


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
    verdict = worst(map(CheckResult.of, value["results"]))
    if value["verdict"] != verdict.value:
        raise FormatError(f"{path}: says {value['verdict']}, and its results {verdict.value}; it was changed")
    return dict(value)

"""What alerts, recording rules and the dashboard ask of Prometheus, read from their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.prometheus import FOLDER, RULES

_NAME = re.compile(r"\b(?:vllm:|sparse_serve_|process_)[a-z_0-9]+")
_RECORDED = re.compile(r"\b(?:job|instance):[a-z_0-9]+:[a-z_0-9]+")


def rules() -> list[dict[str, Any]]:
    """Every rule of both files."""
    files = [yaml.safe_load((FOLDER / name).read_text("utf-8")) for name in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "grafana/dashboard.json").read_text("utf-8")))


def of_dashboard() -> Iterator[tuple[str, str]]:
    """Each panel's title and an expression of it, with its variables as Grafana puts them in for `All`."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], re.sub(r"\$(?:job|instance)\b", ".*", target["expr"])


def every() -> list[str]:
    return [rule["expr"] for rule in rules()] + [expression for _, expression in of_dashboard()]


def metrics(expressions: list[str]) -> set[str]:
    """Names of series that a server exports and these ask for."""
    return {name for expression in expressions for name in _NAME.findall(_RECORDED.sub("", expression))}


def recorded(expressions: list[str]) -> set[str]:
    """Names of recorded series that these ask for."""
    return {name for expression in expressions for name in _RECORDED.findall(expression)}

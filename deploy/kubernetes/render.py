"""Renders the chart for each file of deploy/helm/values, and the alerts as a PrometheusRule: `make manifests`.

Helm's own engine does it, as `helm template sparse-serve deploy/helm/sparse-serve --values FILE` would.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
CHART = DEPLOY / "helm/sparse-serve"
OUT_DIR = DEPLOY / "kubernetes"
RELEASE = "sparse-serve"
_MADE = "# Made by `make manifests`: change {of} instead.\n"


def render(values: dict[str, Any], name: str = RELEASE, namespace: str = "default") -> dict[str, str]:
    """What Helm makes of the chart, by template, without what is empty. Raises its errors for values it refuses."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        made = chart.render(values, name=name, namespace=namespace)
    return {path.removeprefix("sparse-serve/templates/"): text for path, text in sorted(made.items()) if text.strip()}


def manifests() -> dict[str, str]:
    """Every file of deploy/kubernetes that is made, by name."""
    made = {"prometheusrule.yaml": _MADE.format(of="deploy/observability") + prometheus_rule()}
    for file in sorted((DEPLOY / "helm/values").glob("*.yaml")):
        parts = [
            text.strip("\n")
            for path, text in render(yaml.safe_load(file.read_text("utf-8"))).items()
            if path.endswith(".yaml")
        ]
        head = _MADE.format(of=f"the chart, or deploy/helm/values/{file.name},")
        made[file.name] = head + "---\n" + "\n---\n".join(parts) + "\n"
    return made


def prometheus_rule() -> str:
    """The rules of deploy/observability as the Prometheus operator takes them."""
    rules = [
        yaml.safe_load((DEPLOY / "observability" / f"{name}.yml").read_text("utf-8"))
        for name in ("recording", "alerts")
    ]
    labels = {"app.kubernetes.io/name": RELEASE}
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": RELEASE, "labels": labels},
        "spec": {"groups": [group for each in rules for group in each["groups"]]},
    }
    return str(yaml.safe_dump(resource, sort_keys=False, width=1000))


def main() -> None:
    """Write them all."""
    for name, text in manifests().items():
        (OUT_DIR / name).write_text(text, "utf-8")
        print(f"deploy/kubernetes/{name}")


if __name__ == "__main__":
    sys.exit(main())

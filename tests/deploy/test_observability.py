"""Rules and dashboard as they are written; that a real server has what they ask for is in test_container."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.architecture.source import ROOT
from tests.deploy import expressions
from tests.deploy.prometheus import FOLDER, RULES, program

HOST = ROOT / "deploy/rolling/prometheus.yml"
METRICS = (ROOT / "docs/reference/metrics.md").read_text("utf-8")


def promtool(*arguments: str) -> str:
    done = subprocess.run([program("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_rules_and_configuration() -> None:
    assert promtool("check", "rules", *RULES).count("SUCCESS") == len(RULES)
    promtool("check", "config", "--syntax-only", "prometheus.yml")
    promtool("check", "config", "--syntax-only", str(HOST))


def test_the_host_s_prometheus_asks_the_servers_that_the_page_sets_up() -> None:
    """With the job's name and the rules that compose's has."""
    host, compose = (yaml.safe_load(file.read_text("utf-8")) for file in (HOST, FOLDER / "prometheus.yml"))
    page = (ROOT / "docs/rolling.md").read_text("utf-8")
    (job,), (other,) = host["scrape_configs"], compose["scrape_configs"]
    assert job["job_name"] == other["job_name"] and host["rule_files"] == compose["rule_files"]
    ports = re.findall(r"SPARSE_SERVE_HTTP_PORT=(\d+)", page)
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}" for port in ports]}]


def test_every_alert_fires_and_stays_silent_when_it_should() -> None:
    """The cases are in alerts_test.yml: each alert has one where it fires, and one where it must not."""
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")
    alerts = {rule["alert"] for rule in expressions.rules() if "alert" in rule}
    cases = yaml.safe_load((FOLDER / "alerts_test.yml").read_text("utf-8"))["tests"]
    tested = [test for case in cases for test in case.get("alert_rule_test", [])]
    fires = {test["alertname"] for test in tested if test.get("exp_alerts")}
    silent = {test["alertname"] for test in tested if not test.get("exp_alerts")}
    assert alerts == fires == silent


def test_alerts_say_whom_they_call_and_what_is_wrong() -> None:
    for rule in (rule for rule in expressions.rules() if "alert" in rule):
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]
        assert {"summary", "description"} <= set(rule["annotations"]), rule["alert"]


def test_own_metrics_are_those_of_the_manual_and_recorded_ones_are_recorded() -> None:
    """Counters are named as they are exported; histograms end as Prometheus has them."""
    known = set(re.findall(r"^\| `(\w+)`", METRICS, re.MULTILINE))
    own = {name for name in expressions.metrics(expressions.every()) if name.startswith("sparse_serve")}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in own} <= known
    assert expressions.recorded(expressions.every()) <= {rule.get("record") for rule in expressions.rules()}


def test_the_dashboard_is_what_grafana_takes() -> None:
    """The parts of Grafana's schema of a dashboard (version 39) that ours has; no Grafana can be installed for this."""
    board = expressions.dashboard()
    assert board["uid"] == "sparse-serve" and board["schemaVersion"] == 39
    variables = {variable["name"] for variable in board["templating"]["list"]}
    places = []
    for panel in board["panels"]:
        assert panel["type"] in {"stat", "timeseries", "bargauge"} and panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {target["refId"] for target in panel["targets"]} == set("ABCDEFGH"[: len(panel["targets"])])
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        places += [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
    assert len(places) == len(set(places)), "no panel lies on another"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("name", ["datasource.yml", "provider.yml"])
def test_what_provisions_grafana_points_at_the_compose_file_s_places(name: str) -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text("utf-8"))["services"]
    loaded = yaml.safe_load((FOLDER / "grafana" / name).read_text("utf-8"))
    if name == "provider.yml":
        (provider,) = loaded["providers"]
        mounts = [mount.split(":")[1] for mount in compose["grafana"]["volumes"]]
        assert f"{provider['options']['path']}/sparse-serve.json" in mounts
    else:
        (source,) = loaded["datasources"]
        assert source["url"] == "http://prometheus:9090" and source["uid"] == "prometheus"

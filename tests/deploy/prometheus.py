"""A Prometheus of Debian's package as a process for tests, with the configuration and the rules that are shipped."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.architecture.source import ROOT
from tests.vllm.serving import until

FOLDER = ROOT / "deploy/observability"
RULES = ("recording.yml", "alerts.yml")


def program(name: str) -> str:
    """`prometheus` or `promtool`; the test is skipped where there is none."""
    return shutil.which(name) or pytest.skip(f"no {name}: it is in Debian's package prometheus (apt-get install)")


class Prometheus:
    """A running one."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP API. Raises `AssertionError` with its message where it refuses."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            with urllib.request.urlopen(f"{self.address}/api/v1/{path}{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def value(self, query: str) -> float | None:
        """The first sample of an instant query; None if there is none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None


@contextmanager
def scraping(target: str, key_file: Path, port: int, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with deploy/observability, every second, of `target` instead of compose's server."""
    for name in RULES:
        shutil.copy2(FOLDER / name, folder)
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    job["authorization"]["credentials_file"] = str(key_file)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    found = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(lambda: _is_up(found) or process.poll() is not None, 60.0)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield found
    finally:
        process.terminate()
        process.wait(30)


def _is_up(one: Prometheus) -> bool:
    try:
        with urllib.request.urlopen(f"{one.address}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False

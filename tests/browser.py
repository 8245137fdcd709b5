"""A headless Chromium for tests of pages, spoken to over its DevTools protocol."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

_START_S = 60.0


class Page:
    """One page of a browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._sent = 0
        self.errors: list[str] = []
        """What went wrong on the page: exceptions, refused scripts, failed requests."""
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def go(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def until(self, script: str, limit_s: float = 30.0) -> Any:
        """The value of an expression, once it is true."""
        deadline_s = time.monotonic() + limit_s
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline_s, f"{script} did not become true; errors: {self.errors}"
            time.sleep(0.05)
        return value

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        self._connection.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=_START_S))
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])


@contextlib.contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in `folder`. Skips the test where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen([program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_address(folder / "DevToolsActivePort"), max_size=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(file: Path) -> str:
    """Where the first page is spoken to; Chromium writes its port into `file` once it listens."""
    deadline_s = time.monotonic() + _START_S
    while not (file.exists() and file.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline_s, "Chromium did not start"
        time.sleep(0.05)
    port = file.read_text().splitlines()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        pages = [target for target in json.load(answer) if target["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])

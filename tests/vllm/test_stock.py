"""Stock `vllm serve` on a sparse checkpoint: vLLM's own command line and server; of ours only the plugin."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.vllm.offline import NEW_TOKENS, PROMPTS, make_sparse, transformers_oracle

START_S = 150.0


def test_vllm_serve_answers_as_transformers_does(tmp_path: Path) -> None:
    sparse, masked = make_sparse("llama", tmp_path)
    tokens, _ = transformers_oracle(masked)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparse_serve.cli.main", "vllm", "serve", str(sparse), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        body = {"model": str(sparse), "prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = _post(f"http://127.0.0.1:{port}/v1/completions", body)
        assert [choice["token_ids"] for choice in answer["choices"]] == tokens
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no server after {START_S} s:\n{log.read_text()[-3000:]}")


def _post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)

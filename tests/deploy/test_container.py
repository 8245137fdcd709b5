"""A container of the CPU image: as nobody, on a read-only root, it starts, serves, is healthy, and ends with its drain.

The image is of this environment; with SPARSE_SERVE_TEST_IMAGE=1 it is also built, from nothing (`images`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import dockerfile, expressions, images, prometheus, sandbox
from tests.vllm.serving import PROMPT, SPARSE_LAYERS, Running, end, make_checkpoint, until, wait_ready

KEY = "a-key-of-the-tests-of-containers"
BUILT = "SPARSE_SERVE_TEST_IMAGE"
START_S = 400.0
"""All of an image is read from disk for the first time."""

pytestmark = pytest.mark.timeout(1800)


@dataclass
class Container:
    """A container that serves, its image, and the variables that it was started with."""

    running: Running
    image: sandbox.Image
    environ: dict[str, str]

    def execute(self, *command: str) -> tuple[int, str]:
        return sandbox.execute(self.running, self.image, command, self.environ)

    def get(self, path: str, key: str = KEY, body: Any = None) -> str:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        address = f"http://127.0.0.1:{self.environ['SPARSE_SERVE_HTTP_PORT']}{path}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module", params=["this environment", "built"])
def image(request: pytest.FixtureRequest) -> Iterator[sandbox.Image]:
    sandbox.skip_unless_possible()
    if request.param == "built":
        if os.environ.get(BUILT) != "1":
            pytest.skip(f"builds an image, which takes minutes and 8 GB; {BUILT}=1 runs it")
        with images.built() as made:
            yield made
    else:
        yield images.of_this_environment()


def free_ports(count: int) -> list[str]:
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


@pytest.fixture(scope="module")
def container(image: sandbox.Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The image's own command, with a model at /model and keys where secrets are mounted."""
    folder = tmp_path_factory.mktemp("container")
    model, keys = make_checkpoint(folder), folder / "keys"
    keys.write_text(f"{KEY}\n")
    http_port, grpc_port = free_ports(2)
    environ = {
        "SPARSE_SERVE_HTTP_PORT": http_port,
        "SPARSE_SERVE_GRPC_PORT": grpc_port,
        "SPARSE_SERVE_API_KEYS": "/run/secrets/api-keys",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # the image has no compiler; this machine may
        "HF_HUB_OFFLINE": "1",
    }
    stage = dockerfile.stages("cpu")[-1]
    command = [*stage.last("ENTRYPOINT").words, *stage.last("CMD").words, "--served-model-name=tiny"]
    binds = {str(model): "/model", str(keys): "/run/secrets/api-keys"}
    running = sandbox.launch(image, command, folder, environ, binds)
    try:
        until(lambda: "ready:" in running.output or running.process.poll() is not None, START_S)
        yield Container(wait_ready(running), image, environ)
    finally:
        end(running)


def test_the_health_check_of_the_image_passes(container: Container) -> None:
    words = dockerfile.stages("cpu")[-1].last("HEALTHCHECK").rest.partition(" CMD ")[2]
    assert container.execute(*json.loads(words)) == (0, "")
    assert container.execute("sparse-serve-probe", "readyz") == (0, "")


def test_it_answers_who_has_a_key(container: Container) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = json.loads(container.get("/v1/completions", body=body))
    assert answer["usage"]["completion_tokens"] == 4
    with pytest.raises(urllib.error.HTTPError, match="401"):
        container.get("/v1/models", key="of somebody else, and long enough")
    address = f"127.0.0.1:{container.environ['SPARSE_SERVE_GRPC_PORT']}"
    keys = ("--api-key-file", "/run/secrets/api-keys")
    status, text = container.execute(
        "sparse-serve", "generate", "--address", address, *keys, "--max-tokens", "4", PROMPT
    )
    assert status == 0 and text.strip()


def test_a_prometheus_gets_what_alerts_and_the_dashboard_ask_for(container: Container, tmp_path: Path) -> None:
    """Every expression is one that it takes, and every series that one names is exported by this server."""
    key, port = tmp_path / "key", free_ports(1)[0]
    key.write_text(f"{KEY}\n")
    target = f"127.0.0.1:{container.environ['SPARSE_SERVE_HTTP_PORT']}"
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
    with prometheus.scraping(target, key, int(port), tmp_path) as one:
        until(lambda: one.value('up{job="sparse-serve"}') == 1.0, 60.0)
        for _ in range(3):
            container.get("/v1/completions", body=body)
        until(lambda: one.value("instance:vllm_generation_tokens:rate1m") not in (None, 0.0), 60.0)
        exported = set(one.ask("label/__name__/values"))
        once_it_happens = {"sparse_serve_cancelled_total"}
        assert expressions.metrics(expressions.every()) - exported <= once_it_happens
        for expression in expressions.every():
            one.ask("query", query=expression)
        rules = [rule for group in one.ask("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == len(expressions.rules())
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, [rule.get("lastError") for rule in rules]
        assert one.value("job:sparse_serve_errors:ratio_rate5m") == 0.0
        assert one.value("sum(sparse_serve_sparse_layers)") == SPARSE_LAYERS


def test_it_is_nobody_and_can_become_nobody_else(container: Container) -> None:
    user = container.image.user.split(":")[0]
    assert container.execute("id", "-u") == (0, f"{user}\n")
    assert {int(each, 16) for each in sandbox.capabilities(container.running)} == {0}


def test_only_volumes_and_tmp_can_be_written(container: Container) -> None:
    for place in ("/", "/etc", "/opt/sparse-serve/bin", "/model", "/home"):
        status, said = container.execute("touch", f"{place}/new")
        assert status != 0 and ("Read-only" in said or "denied" in said), place
    for place in ("/tmp", "/cache", "/dev/shm"):
        assert container.execute("touch", f"{place}/new")[0] == 0, place


def test_the_first_process_is_the_server_and_a_signal_ends_it_with_0(container: Container) -> None:
    first = sandbox.first_process(container.running)
    assert b"sparse-serve" in Path(f"/proc/{first}/cmdline").read_bytes()
    os.kill(first, signal.SIGTERM)
    assert container.running.process.wait(60) == 0
    until(lambda: not Path(f"/proc/{first}").exists())

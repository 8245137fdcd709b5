"""The compose files, read as the Compose Specification has them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from sparse_serve.server.settings import Settings
from tests.architecture.source import ROOT
from tests.deploy import dockerfile

FOLDER = ROOT / "deploy"


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text("utf-8")))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_it_is_a_compose_file(name: str) -> None:
    """Its parser refuses unknown keys and wrong types. Variables are put in first, as Compose does."""
    spec = pytest.importorskip("compose_spec", reason="of deploy/locks/deploy.txt, which `make test` installs")
    text = re.sub(
        r"\$\{\w+:[-?]([^}]*)\}", lambda match: match[1].replace(" ", "-"), (FOLDER / name).read_text("utf-8")
    )
    compose = spec.PyCompose.from_yaml(text)
    compose.to_spec()
    with pytest.raises(Exception, match="volumse"):
        spec.PyCompose.from_yaml(text + "\nvolumse: {}\n")


def test_what_is_mounted_is_there() -> None:
    mounts = [mount for service in load("compose.yaml")["services"].values() for mount in service.get("volumes", [])]
    ours = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert len(ours) == 6 and all((FOLDER / source).is_file() for source in ours)


@pytest.mark.parametrize("service", ["server", "prometheus", "grafana"])
def test_nothing_is_open_to_the_network_or_privileged(service: str) -> None:
    one = load("compose.yaml")["services"][service]
    assert all(port.startswith("127.0.0.1:") for port in one["ports"])
    assert one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"]


def test_the_server_fits_its_image_and_its_drain() -> None:
    server = load("compose.yaml")["services"]["server"]
    last = dockerfile.stages("cpu")[-1]
    assert server["read_only"] and {mount.split(":")[1] for mount in server["volumes"] if "cache" in mount} == set(
        last.last("VOLUME").words
    )
    settings = {name.removeprefix("SPARSE_SERVE_").lower(): value for name, value in server["environment"].items()}
    drain_s = Settings(drain_s=float(settings["drain_s"])).drain_s
    assert float(server["stop_grace_period"].removesuffix("s")) > drain_s + 10
    named = {load(name)["services"]["server"]["build"]["dockerfile"] for name in ("compose.yaml", "compose.cuda.yaml")}
    assert named == {"deploy/container/Dockerfile.cpu", "deploy/container/Dockerfile.cuda"}

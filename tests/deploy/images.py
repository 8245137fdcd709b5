"""Images to run: the CPU one as buildah builds it, and one whose packages are those of this environment.

The second costs nothing to make. Its last stage is run as it stands in the Dockerfile, over this machine's files, but
for the copy of what the stage before installed; that is where the environment of the tests is shown instead. What it
cannot show, a package that the Dockerfile forgets, is what the first is for.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.architecture.source import ROOT
from tests.deploy import dockerfile
from tests.deploy.sandbox import Image

HOME = "/opt/sparse-serve"
BASE = "debian:bookworm-slim"


def of_this_environment() -> Image:
    """The last stage of Dockerfile.cpu over `/`, with the environment that runs the tests."""
    stage = dockerfile.stages("cpu")[-1]
    steps = [f"mkdir -p $root{HOME}/bin", f"ln -s {sys.prefix}/bin/* $root{HOME}/bin/"]
    for step in stage.steps:
        if step.word == "RUN":
            steps.append(f"chroot $root sh -c {shlex.quote(step.rest)}")
        elif step.word == "COPY" and not step.flag("from"):
            source, to = step.words
            steps.append(f"cp --preserve=mode {ROOT / source} $root{to}")
    kept = [Path(place).resolve() for place in (ROOT, sys.prefix, sys.base_prefix)]
    outermost = {str(place) for place in kept if not set(place.parents) & set(kept)}
    return Image(
        lower=Path("/"),
        environ=dockerfile.environment(stage),
        user=stage.last("USER").rest,
        volumes=stage.last("VOLUME").words,
        folder=stage.last("WORKDIR").rest,
        steps=steps,
        binds={place: place for place in sorted(outermost)},
    )


@contextmanager
def built() -> Iterator[Image]:
    """Dockerfile.cpu built by buildah, which needs no daemon, on a base that debootstrap makes. Minutes, and 8 GB."""
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"takes {' and '.join(missing)}, Debian's packages of these names")
    if not list((ROOT / "dist").glob("*.whl")):
        pytest.skip("takes the wheel of `make wheel`")
    work = Path(os.environ.get("SPARSE_SERVE_TEST_IMAGE_FOLDER") or "/var/tmp/sparse-serve-image")
    work.mkdir(parents=True, exist_ok=True)
    run = _Buildah(work)
    try:
        run.base()
        with_pip = [part for place, here in _pip(work).items() for part in ("--volume", f"{place}:{here}:ro")]
        file = ["--file", "deploy/container/Dockerfile.cpu", "--format", "docker", "--tag", "sparse-serve:cpu"]
        run("bud", "--layers=false", "--pull=never", "--network=host", *with_pip, *file, str(ROOT))
        container = run("from", "--pull=never", "sparse-serve:cpu")
        config = json.loads(run("inspect", "--type=image", "sparse-serve:cpu"))["Docker"]["config"]
        assert config["Entrypoint"] == ["sparse-serve"] and config["Healthcheck"]["Test"][0] == "CMD"
        yield Image(
            lower=Path(run("mount", container)),
            environ=dict(each.split("=", 1) for each in config["Env"]),
            user=config["User"],
            volumes=list(config["Volumes"]),
            folder=config["WorkingDir"],
        )
    finally:
        run("rm", "--all")
        shutil.rmtree(work)


class _Buildah:
    """buildah with a store of its own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.environ = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *arguments: str) -> str:
        command = ["buildah", "--root", str(self.work / "store"), "--runroot", str(self.work / "run"), *arguments]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments[:2]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def base(self) -> None:
        """What a registry has under the name of the base, as far as Debian's packages make it."""
        files = self.work / "base"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(files)], check=True, capture_output=True)
        container = self("from", "scratch")
        self("add", container, str(files), "/")
        self("commit", container, f"docker.io/library/{BASE}")
        shutil.rmtree(files)


def _pip(work: Path) -> dict[str, str]:
    """What to show a build, and where, so that its pip finds packages as this machine's does: by place here."""
    lines = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in lines.stdout.splitlines() if line.startswith("global."))
    settings = {name.removeprefix("global."): value.strip("'\"") for name, value in found.items()}
    shown, config = {}, ["[global]", "timeout = 180"]
    for name in ("cert", "find-links"):
        if Path(settings.get(name, "")).exists() and name in settings:
            shown[settings[name]] = f"/opt/pip/{name}"
            config.append(f"{name} = /opt/pip/{name}")
    config += [f"{name} = {settings[name]}" for name in ("index-url",) if name in settings]
    (work / "pip.conf").write_text("\n".join(config) + "\n")
    return shown | {str(work / "pip.conf"): "/etc/pip.conf"}

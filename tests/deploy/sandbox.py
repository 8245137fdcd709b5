"""Runs a container of an image without an engine for containers: what Linux does for one, done by hand.

A process of an image gets a root of its own, which is an overlay over a folder, is read-only once its steps have run,
and has temporary file systems at /tmp, /dev/shm and the image's volumes; ids of its own, which it is number 1 of; the
image's user, without any capability and without a way to get one; and the image's variables and no others. It shares
the network, so that a test can talk to it. All of that is gone with the process. It takes root, and Linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.vllm.serving import Running, descendants, until

_TOOLS = ("unshare", "nsenter", "setpriv", "chroot", "mount")
_SCRIPT = """
set -e
mount -t tmpfs overlay {work}
mkdir {work}/upper {work}/changes {work}/root
mount -t overlay overlay -o lowerdir={lower},upperdir={work}/upper,workdir={work}/changes {work}/root
root={work}/root
{steps}
{places}
mount -o remount,ro $root
mount -t proc proc $root/proc
mount --bind /sys $root/sys
mount -o remount,ro,bind $root/sys
mount --rbind /dev $root/dev
mount -t tmpfs tmpfs $root/dev/shm
{volumes}
{binds}
exec chroot $root {command}
"""


@dataclass(frozen=True)
class Image:
    """What a container is made of. `lower`: its files. `steps` are run as root before it is made read-only."""

    lower: Path
    environ: Mapping[str, str]
    user: str
    volumes: Sequence[str]
    folder: str
    steps: Sequence[str] = ()
    binds: Mapping[str, str] = field(default_factory=dict)


def skip_unless_possible() -> None:
    """Skip the test, and say why, where containers cannot be run like this."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"takes root and {', '.join(_TOOLS)}; missing: {', '.join(missing) or 'root'}")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make a mount namespace")


def launch(
    image: Image, command: Sequence[str], directory: Path, more: Mapping[str, str], binds: Mapping[str, str]
) -> Running:
    """Start a container. `more`: variables beside the image's. `binds`: what is mounted, read-only, and where.

    `directory` gets its output, in the files `out` and `err`.
    """
    work = directory / "overlay"
    work.mkdir()
    all_binds = {**image.binds, **binds}
    fixed = {outside: inside for outside, inside in all_binds.items() if not inside.startswith("/tmp/")}
    script = _SCRIPT.format(
        work=work,
        lower=image.lower,
        steps="\n".join(image.steps),
        places="\n".join(_place(outside, inside) for outside, inside in fixed.items()),
        volumes="\n".join(_volume(place, image.user) for place in ["/tmp", *image.volumes]),
        binds="\n".join(_bind(outside, inside) for outside, inside in all_binds.items()),
        command=shlex.join([*_as_user(image, more), *command]),
    )
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        namespaces = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        process = subprocess.Popen(
            [*namespaces, "sh", "-c", script], stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True
        )
    until(lambda: process.poll() is not None or descendants(process.pid))
    return Running(process, directory, descendants(process.pid))


def execute(running: Running, image: Image, command: Sequence[str], more: Mapping[str, str]) -> tuple[int, str]:
    """Run one command in a container, as a health check is. Returns its exit status and all that it printed."""
    pid = first_process(running)
    root = str(Path(f"/proc/{pid}/root").readlink())
    enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "chroot", root]
    done = subprocess.run([*enter, *_as_user(image, more), *command], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def first_process(running: Running) -> int:
    """The number, here, of the process that is 1 there."""
    return min(descendants(running.process.pid), key=lambda pid: int(_status(pid, "NSpid").split()[-1]))


def capabilities(running: Running) -> set[str]:
    """What its first process may do beside what every user may, now or later: one number, 0, if nothing."""
    pid = first_process(running)
    return {_status(pid, name) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


def _as_user(image: Image, more: Mapping[str, str]) -> list[str]:
    user, group = image.user.split(":")
    drop = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    variables = [f"{name}={value}" for name, value in {**image.environ, **more}.items()]
    return ["setpriv", f"--reuid={user}", f"--regid={group}", *drop, "env", "-i", "-C", image.folder, *variables]


def _volume(place: str, user: str) -> str:
    uid, gid = user.split(":")
    mode = "mode=1777,noexec,nosuid,nodev" if place == "/tmp" else f"mode=750,uid={uid},gid={gid}"
    return f"mount -t tmpfs -o {mode} tmpfs $root{place}"


def _place(outside: str, inside: str) -> str:
    """Make the place that something is mounted at. Whoever may see that may pass the folders on the way to it."""
    folder, file = f"mkdir -p $root{inside}", f"mkdir -p $root{Path(inside).parent}; : >> $root{inside}"
    make = folder if Path(outside).is_dir() else file
    above = [f"$root{folder}" for folder in Path(inside).parents if len(folder.parts) > 1 and folder != Path("/tmp")]
    return f"{make}; chmod a+x {' '.join(above)}" if above else make


def _bind(outside: str, inside: str) -> str:
    make = _place(outside, inside) if inside.startswith("/tmp/") else ":"
    return f"{make}; mount --bind {outside} $root{inside}; mount -o remount,ro,bind $root{inside}"

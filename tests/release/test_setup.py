"""What `pip install .` does where the CPU kernel cannot be built: it fails, and the last line says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import setuptools

from tests.architecture.source import ROOT


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with setuptools and nothing else, as pip's isolated builds have it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (folder / "build").mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        (folder / "build" / name).symlink_to(installed / name)
    return folder


def build(environment: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SPARSE_SERVE_")}
    environ |= {"PYTHONPATH": str(environment / "build"), "PYTHONUSERBASE": str(out)} | variables
    command = [str(environment / "bin/python"), "setup.py", "-q", "build_ext", "--build-lib", str(out / "lib")]
    command += ["--build-temp", str(out / "temp")]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel is for Linux")
def test_without_torch_the_build_fails_and_says_so(bare: Path, tmp_path: Path) -> None:
    done = build(bare, tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith("error: the CPU kernel of sparse-serve cannot be built: no torch in ")
    assert "pip install 'torch>=2.11'" in last and "SPARSE_SERVE_NATIVE=off" in last
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel is for Linux")
def test_a_number_of_compilers_that_is_none_is_refused(tmp_path: Path) -> None:
    done = build(Path(sys.prefix), tmp_path, MAX_JOBS="all")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "cannot be built: MAX_JOBS is 'all', expected how many" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel is for Linux")
def test_an_old_torch_of_the_environment_is_found_and_refused(bare: Path, tmp_path: Path) -> None:
    """Not on sys.path of an isolated build, which is why it has to be looked for."""
    old = site_packages(bare) / "torch"
    old.mkdir(parents=True)
    (old / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    try:
        done = build(bare, tmp_path)
    finally:
        (old / "version.py").unlink()
        old.rmdir()
    assert done.returncode != 0
    assert "is older than 2.11; upgrade it" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel is for Linux")
def test_without_a_compiler_the_build_fails_and_says_so(bare: Path, tmp_path: Path) -> None:
    done = build(bare, tmp_path, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no C++ compiler (no-such-compiler); install GCC 11 or newer" in done.stderr.splitlines()[-1]


def test_without_the_kernel_only_where_that_was_said(bare: Path, tmp_path: Path) -> None:
    done = build(bare, tmp_path, SPARSE_SERVE_NATIVE="off")
    assert (done.returncode, list(tmp_path.rglob("*.so"))) == (0, [])
    done = build(bare, tmp_path, SPARSE_SERVE_NATIVE="maybe")
    assert done.returncode != 0
    assert "SPARSE_SERVE_NATIVE is 'maybe'; expected required (the default) or off" in done.stderr.splitlines()[-1]

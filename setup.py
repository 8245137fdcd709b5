"""Builds the native CPU kernel beside the Python sources; everything else is in pyproject.toml.

It takes a C++20 compiler, and torch's headers and libraries from the environment that is installed into, with or
without build isolation; nothing is downloaded. The result uses torch's stable ABI and nothing of Python: one build is
for every torch from 2.11 on and every Python, which the wheel's tag says (py3-none).

Where the kernel cannot be built, the build fails and its last line says what is missing. SPARSE_SERVE_NATIVE=off
installs without it: on CPUs sparse layers are then slower than dense ones, as `sparse-serve serve` and `sparse-serve
doctor` say.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

SOURCES = Path("sparse_serve/kernels/csrc")
OLDEST_TORCH = (2, 11)
"""TORCH_TARGET_VERSION below, and the least torch in pyproject.toml, say the same."""

FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a product and a sum are one instruction only where the code says so
    "-Werror=return-type",
    "-D_GLIBCXX_USE_CXX11_ABI=1",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
]


def wants_kernel() -> bool:
    """By SPARSE_SERVE_NATIVE: `required`, which is the default, or `off`."""
    wanted = os.environ.get("SPARSE_SERVE_NATIVE", "required")
    if wanted not in ("required", "off"):
        raise SystemExit(f"error: SPARSE_SERVE_NATIVE is {wanted!r}; expected required (the default) or off")
    return wanted == "required"


def fail(missing: str) -> None:
    """End the build. This line is the last one that pip shows of it."""
    raise SystemExit(
        f"error: the CPU kernel of sparse-serve cannot be built: {missing}; or install without it: "
        "SPARSE_SERVE_NATIVE=off pip install ... (sparse layers on CPUs are then slower than dense ones; GPUs do not "
        "need it)"
    )


def torch_folder() -> Path:
    """torch of this process, or, as pip isolates builds, of the environment that it installs into."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    oldest = ".".join(map(str, OLDEST_TORCH))
    for place in places:
        version_file = Path(place, "torch/version.py")
        if not version_file.is_file():
            continue
        found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version_file.read_text("utf-8"))
        if found is None or tuple(map(int, found.groups())) < OLDEST_TORCH:
            fail(f"torch in {place} is older than {oldest}; upgrade it: pip install 'torch>={oldest}'")
        return version_file.parent
    fail(f"no torch in {sys.prefix}; install it first: pip install 'torch>={oldest}'")
    raise AssertionError("unreachable")


def several_at_a_time(compile_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """A compiler's `compile` that runs as many compilers as there are processors, or MAX_JOBS as torch has it."""
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdecimal() or int(jobs) == 0:
        fail(f"MAX_JOBS is {jobs!r}, expected how many compilers may run at a time")

    def compile_each(sources: list[str], **options: object) -> list[str]:
        with ThreadPoolExecutor(int(jobs)) as pool:
            made = pool.map(lambda source: compile_all([source], **options), sources)
            return [file for files in made for file in files]

    return compile_each


class BuildNative(build_ext):
    """The kernel with torch's include and library folders, and without Python's in its name."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, or say what is missing."""
        compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
        if shutil.which(compiler) is None:
            fail(f"no C++ compiler ({compiler}); install GCC 11 or newer (Debian, Ubuntu: apt install g++)")
        torch = torch_folder()
        ext.include_dirs += [str(torch / "include"), str(torch / "include/torch/csrc/api/include")]
        ext.library_dirs += [str(torch / "lib")]
        try:
            self.compiler.compile = several_at_a_time(self.compiler.compile)
            super().build_extension(ext)
        except (BaseError, CompileError, LinkError) as error:
            fail(f"{compiler} failed, as it says above ({error}); GCC 11 or newer is known to work")

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: in place of any earlier build, some under names that Python prefers."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            kept = Path(self.get_ext_fullpath(ext.name)).resolve()
            for leftover in kept.parent.glob(f"{kept.stem}.*.so"):
                leftover.unlink()

    def get_ext_filename(self, fullname: str) -> str:
        """`_cpu_kernel.so`: any Python may load it, as torch does the loading."""
        return f"{fullname.replace('.', os.sep)}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: it is loaded by torch, not imported by Python."""
        return []


class AnyPythonWheel(bdist_wheel):
    """A wheel whose tag names the platform, but no Python: the kernel uses nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """`py3-none-PLATFORM`."""
        return "py3", "none", super().get_tag()[2]


def native() -> list[Extension]:
    """The CPU kernel, unless it is not wanted or this is no Linux."""
    if not wants_kernel() or not sys.platform.startswith("linux"):
        return []
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    if not sources:
        raise SystemExit(f"error: {SOURCES} is missing: these are not the whole sources")
    return [
        Extension(
            "sparse_serve.kernels._cpu_kernel",
            sources,
            depends=["setup.py", *sorted(map(str, SOURCES.glob("*.h")))],
            libraries=["torch_cpu", "c10"],
            extra_compile_args=FLAGS,
            language="c++",
        )
    ]


setup(ext_modules=native(), cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})

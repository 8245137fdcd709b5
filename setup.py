"""Builds the native CPU kernel beside the Python sources; everything else is in pyproject.toml.

It needs a C++ compiler and the torch it will run with (`pip install --no-build-isolation`): the headers, nothing is
downloaded or linked for one version. Where either is missing the package installs without it, and says so when a model
is served.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """The extension with torch's include and library folders."""

    def build_extension(self, ext: Extension) -> None:
        """Compile. Without any compiler setuptools leaves an `optional` extension out, with a warning."""
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        ext.extra_compile_args += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: it is loaded by torch, not imported by Python."""
        return []


def native() -> list[Extension]:
    """The CPU kernel, where torch is at hand to build against."""
    try:
        import torch  # noqa: F401
    except ImportError:
        print("sparse-serve: no torch to build against, so without the native CPU kernel", file=sys.stderr)  # noqa: T201
        return []
    sources = sorted(Path("sparse_serve/csrc").glob("*.cpp"))
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    return [
        Extension(
            "sparse_serve._cpu_kernel",
            [str(path) for path in sources],
            depends=[str(path) for path in Path("sparse_serve/csrc").glob("*.h")],
            libraries=["torch_cpu", "c10"],
            extra_compile_args=flags,
            language="c++",
            optional=shutil.which(os.environ.get("CXX", "c++")) is None,
        )
    ]


setup(ext_modules=native(), cmdclass={"build_ext": BuildNative})

